"""The client of chat endpoints against a real server that fails in every way, and the file of rows that is left."""
import base64, io, json, os, signal, subprocess, sys, time

import pytest
from PIL import Image

from chat_server import ChatServer
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import Example, RunFolder, VlmError, read_jsonl
from vlm_tutor.endpoint import *
from vlm_tutor.metrics import evaluate
from vlm_tutor.predict import predict
from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format

QUICK = dict(wait=.01, retries=3, timeout=.5)


@pytest.fixture
def example(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "page.png")
    return Example("r1", [str(tmp_path / "page.png")], "Read it.", '{"total":"1"}', system="You read.")


@pytest.fixture
def run(tmp_path):
    "A run folder over six receipts"
    save_cord_dataset_in_sharegpt_format(tmp_path / "data", n=6)
    config = load_config("tiny", dict(data=tmp_path / "data", output_dir=str(tmp_path / "run")))
    return RunFolder.create(tmp_path / "run", as_dict(config))


def ask(run, server, *words, group="gpt", **more):
    habits = [f"{name}={value}" for name, value in QUICK.items()]
    return predict(str(run.path), group, endpoint=server.url, model="toy", overrides=[*habits, *words], **more)


def rows(run, group="gpt"): return read_jsonl(run.predictions(group))


# --- one call ---------------------------------------------------------------------------------------------------------
def test_the_request_is_the_protocols(example, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ChatServer() as server:
        row = ask_once(Endpoint(server.url, "toy", price_in=2, price_out=10), example, BODY)
        call = server.calls[0]
    assert call["path"] == "/v1/chat/completions" and call["headers"]["Authorization"] == "Bearer sk-secret"
    system, user = call["body"]["messages"]
    image, text = user["content"]
    assert system == dict(role="system", content="You read.") and text == dict(type="text", text="Read it.")
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == open(example.image, "rb").read()
    assert call["body"]["temperature"] == 0 and call["body"]["model"] == "toy"
    assert row["cost"] == pytest.approx((1000*2 + 10*10)/1e6) and row["seconds"] > 0 and "sk-secret" not in str(row)


def test_a_photo_held_sideways_is_sent_upright(tmp_path):
    page, notes = Image.new("RGB", (8, 4), "white"), Image.Exif()
    page.putpixel((0, 0), (0, 0, 0))
    notes[0x0112] = 6 # a quarter turn to the right
    page.save(tmp_path / "p.png", exif=notes)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    sent = Image.open(io.BytesIO(base64.b64decode(image_url(tmp_path / "p.png").split(",")[1])))
    assert sent.size == (4, 8) and sent.getexif().get(0x0112, 1) == 1 and sent.getpixel((3, 0)) == (0, 0, 0)
    assert base64.b64decode(image_url(tmp_path / "broken.png").split(",")[1]) == b"\x89PNG and no more"


@pytest.mark.parametrize("how", [429, 500, 503, "slow", "cut", "half", "hang up", "later"])
def test_what_passes_is_tried_again(example, how):
    with ChatServer({0: how, 1: how}) as server:
        row = ask_once(Endpoint(server.url, "toy", **QUICK), example, BODY)
        gaps = [b - a for a, b in zip(server.began, server.began[1:])]
    assert (row["raw"], row["error"], row["tries"]) == ('{"total":"1"}', None, 3)
    if how == "later": assert min(gaps) >= .19


@pytest.mark.parametrize("how, said", [
    (400, "HTTP 400"), (401, "HTTP 401"), (404, "HTTP 404"), ("html", "no chat completion: <html>Sign in"),
    ("empty", "no chat completion: nothing"), ("list", "no chat completion: []"), ("refusal", "no chat completion"),
    ("error", "overloaded"), ("deep", "no chat completion"), ("binary", "no chat completion")])
def test_what_stays_is_told_at_once(example, how, said):
    with ChatServer({0: how}) as server: row = ask_once(Endpoint(server.url, "toy", **QUICK), example, BODY)
    assert said in row["error"] and row["tries"] == 1 and row["raw"] == "" and "\n" not in row["error"]


def test_tries_come_to_an_end(example):
    with ChatServer(lambda number, call: 500) as server:
        row = ask_once(Endpoint(server.url, "toy", **QUICK), example, BODY)
        assert len(server.calls) == row["tries"] == 4 and row["error"].startswith("HTTP 500")


def test_a_key_goes_nowhere_else(example, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with ChatServer() as other, ChatServer({0: 400, 1: "away"}) as server:
        server.elsewhere = other.url + "/chat/completions"
        told, moved = (ask_once(Endpoint(server.url, "toy", key="MY_KEY", **QUICK), example, BODY) for _ in range(2))
        assert not other.calls
    assert "with Bearer ***" in told["error"] and moved["error"].startswith("HTTP 302")
    for bad in ("https://me:pass@host/v1", "https://host/v1?key=sk-secret"):
        with pytest.raises(VlmError) as error: Endpoint(bad, "toy")
        assert "sk-secret" not in str(error.value)


def test_waits_double_with_jitter():
    for attempt in range(5):
        waits = [back_off(attempt, 1) for _ in range(200)]
        assert 2**attempt/2 <= min(waits) < max(waits) <= 2**attempt and len(set(waits)) > 100
    assert back_off(30, 1) <= 60 and back_off(0, 1, "20") == 20 and back_off(0, 1, "Wed, 21 Oct") <= 1


# --- many calls -------------------------------------------------------------------------------------------------------
def test_concurrency_and_pace_are_kept(example):
    with ChatServer(seconds=.05) as server:
        assert len(list(ask_all(Endpoint(server.url, "toy", concurrency=3), [example]*12, BODY))) == 12
        assert server.most == 3
    with ChatServer() as server:
        list(ask_all(Endpoint(server.url, "toy", concurrency=8, per_minute=1200), [example]*8, BODY))
        assert server.began[-1] - server.began[0] >= 7*.05 - .02


def test_every_failure_is_a_row_and_counts(run):
    plan = {1: "html", 2: 400, 4: "slow"}
    with ChatServer(plan) as server:
        result = ask(run, server, "concurrency=1", "retries=0")
        assert (result["n"], result["errors"]) == (6, 3) and result["tokens"] == [3000, 30]
        found = evaluate(run.path, "gpt")
        assert (found["n"], found["failed"], found["valid_json"]) == (6, 3, .5)
        again = ask(run, server, "concurrency=1")
        assert len(server.calls) == 9 and (again["reused"], again["errors"]) == (3, 0)


def test_what_the_answers_depend_on_is_their_key(run):
    with ChatServer() as server:
        ask(run, server)
        assert ask(run, server)["reused"] == 6 and len(server.calls) == 6
        assert ask(run, server, "concurrency=2", "price_in=5")["reused"] == 6  # habits change no answer
        assert ask(run, server, "body.temperature=0.5")["reused"] == 0 and rows(run)[0]["decoding"]["temperature"] == .5
        data = next((run.path.parent / "data").glob("*_test.json"))
        data.write_text(data.read_text().replace("Extract", "Give"))
        assert ask(run, server, "body.temperature=0.5")["reused"] == 0
    assert len(list(run.predictions("gpt").parent.glob("*.stale-*"))) == 2


ASK = """from vlm_tutor.predict import predict
predict({!r}, 'gpt', endpoint={!r}, model='toy', overrides=['concurrency=2'])"""


def test_a_stopped_run_goes_on(run):
    with ChatServer(seconds=.4) as server:
        process = subprocess.Popen([sys.executable, "-c", ASK.format(str(run.path), server.url)],
                                   stderr=subprocess.DEVNULL, env=os.environ | {"OPENAI_API_KEY": "sk-secret"},
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        path = run.predictions("gpt")
        while not (path.exists() and path.read_bytes().count(b"\n") >= 2) and process.poll() is None: time.sleep(.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
        kept = path.read_bytes().count(b"\n")
        asked = len(server.calls)
        server.seconds = 0
        result = ask(run, server)
        assert 2 <= kept < 6 and result["reused"] == kept and len(server.calls) == asked + 6 - kept
    assert len({row["id"] for row in rows(run)}) == len(rows(run)) == 6
    for file in run.path.rglob("*"): assert not file.is_file() or b"sk-secret" not in file.read_bytes()


def test_an_object_that_is_no_answer_may_pass_and_stays_a_row(run):
    for odd in ("refusal", "error"):
        with ChatServer(lambda number, call: odd) as server:
            assert ask(run, server, group=odd)["errors"] == len(server.calls) == 6


def test_a_hopeless_endpoint_ends_at_the_first_call(run):
    for status in (401, 403, 404):
        with ChatServer(lambda number, call: status) as server:
            with pytest.raises(VlmError, match=f"HTTP {status}"): ask(run, server)
            assert len(server.calls) == 1
    for odd, said in (("html", "<html>Sign in"), ("list", r"\[\]"), ("empty", "nothing")):
        with ChatServer(lambda number, call: odd) as server:
            with pytest.raises(VlmError, match=f"does not answer .* no chat completion: {said}"): ask(run, server)
            assert len(server.calls) == 1
    with pytest.raises(VlmError, match="OPENAI_API_KEY is"): ask(run, server)  # nobody listens there any more
    assert not run.predictions("gpt").exists()


@pytest.mark.parametrize("words, more", [
    ("cannot name what an endpoint answers", dict(group="finetuned-model")), ("Add --model NAME", dict(model=None)),
    ("do not go with an endpoint", dict(schema="cord")), ("Did you mean 'retries'", dict(overrides=["retry=1"])),
    ("belong to an endpoint", dict(endpoint=None)), ("no address", dict(endpoint="ftp://host"))])
def test_bad_input_is_refused(run, words, more):
    given = dict(group="gpt", endpoint="http://127.0.0.1:9/v1", model="toy") | more
    with pytest.raises(VlmError, match=words): predict(str(run.path), **given)


def test_an_endpoint_needs_no_torch(run):
    with ChatServer() as server:
        code = ASK.format(str(run.path), server.url) + "\nimport sys; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def test_the_command(run):
    with ChatServer() as server:
        words = ["predict", str(run.path), "--group", "gpt", "--endpoint", server.url, "--model", "toy", "price_in=1"]
        made = subprocess.run([sys.executable, "-m", "vlm_tutor.cli", *words, "--json"], capture_output=True, text=True)
    assert json.loads(made.stdout)["cost"] == pytest.approx(6*1000/1e6), made.stderr
