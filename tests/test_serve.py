"""The server from outside: the model's own answers, what is refused, a crowd, a stop, and the page in a browser."""
import base64, http.client, json, os, re, shutil, signal, socket, subprocess, sys, threading, time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from vlm_tutor.config import load_config
from vlm_tutor.core import RunFolder, VlmError, atomic_write, read_jsonl
from vlm_tutor.extract import Extractor, Task
from vlm_tutor.predict import BASE_FILE, predict, split_examples
from browser import CHROMIUM, Browser
from test_export import write_adapter
from test_predict import make_run

pytest.importorskip("fastapi", reason="NO FASTAPI: the server is not tested. pip install 'vlm_tutor[serve]'")
from vlm_tutor import serve as s


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two runs over one base and one data set, `run` and `other`, each with an adapter of its own"
    run = make_run(tmp_path_factory.mktemp("runs"))
    write_adapter(run.adapter)
    shutil.copytree(run.path, run.path.parent/"other")
    shutil.rmtree(run.path.parent/"other/adapter")
    write_adapter(run.path.parent/"other/adapter", seed=1)
    return run, RunFolder(run.path.parent/"other")


@pytest.fixture(scope="module")
def model(runs): return Extractor.from_run(runs[0].path)


@pytest.fixture(scope="module")
def page(runs): return os.path.abspath(split_examples(load_config(runs[0].config_file), "test")[0].image)


@pytest.fixture(scope="module")
def address(model):
    with s.running(s.make_app(model)) as address: yield address


class Slow:
    "In the model's place: takes its time, answers with the question, and notes its batches"
    def __init__(self, seconds=.05):
        self.adapters, self.tasks, self.context = {"slow": None}, {"slow": Task("q", max_new_tokens=50)}, 4096
        self.seconds, self.batches = seconds, []

    def use(self, name): return self

    def answer(self, examples, *rest):
        from vlm_tutor.extract import Extraction
        time.sleep(self.seconds)
        self.batches.append(len(examples))
        if any("poison" in e.prompt for e in examples): raise RuntimeError("no memory")
        return [Extraction(json.dumps(dict(said=e.prompt)), None, (5, 5)) for e in examples]


def question(page, text, **more): return s.image_request(page, text) | more


def said(told): return json.loads(told["choices"][0]["message"]["content"])["said"]


# --- the model's own answers ------------------------------------------------------------------------------------------
def test_the_server_answers_as_predict_does(runs, address):
    run = runs[0]
    predict(str(run.path))
    rows = {row["id"]: row for row in read_jsonl(run.predictions("finetuned-model"))}
    for example in split_examples(load_config(run.config_file), "test"):
        asked = s.image_request(example.image, example.prompt)
        status, told = s.post(address, asked | dict(max_tokens=rows[example.id]["decoding"]["max_new_tokens"]))
        assert status == 200 and told["choices"][0]["message"]["content"] == rows[example.id]["raw"]


def test_vlm_predict_finds_the_same_over_http(runs, address):
    run = runs[0]
    predict(str(run.path))
    found = predict(str(run.path), "served", endpoint=f"{address}/v1", model="run")
    rows = [{row["id"]: row["raw"] for row in read_jsonl(run.predictions(group))}
            for group in ("served", "finetuned-model")]
    assert found["n"] == 6 and found["errors"] == 0
    for name, text in rows[0].items():
        assert text and (text.startswith(rows[1][name]) or rows[1][name].startswith(text))


def test_several_runs_answer_under_their_names(runs, page):
    alone = {run.path.name: Extractor.from_run(run.path) for run in runs}
    wanted = {name: m.answer([m.example(page)])[0].raw for name, m in alone.items()}
    with s.running(s.make_app(s.open_models(",".join(str(run.path) for run in runs)))) as address:
        for name in ("run", "other", "run"): assert s.ask_server(address, page, model=name) == wanted[name]
        status, told = s.post(address, s.image_request(page, model="third"))
    assert wanted["run"] != wanted["other"]
    assert status == 404 and "Models here: run, other" in told["error"]["message"]


def test_an_adapter_of_another_base_is_not_served(runs, tmp_path):
    shutil.copytree(runs[0].path, tmp_path/"run")
    atomic_write(tmp_path/"run/adapter"/BASE_FILE, '{"name": "another", "hash": "0000000000000000"}')
    with pytest.raises(VlmError, match="was trained on another"): s.open_models(tmp_path/"run")


def test_json_is_mended_when_json_is_wanted(address, page, model):
    raw = s.ask_server(address, page)
    _, told = s.post(address, s.image_request(page) | dict(response_format=dict(type="json_object")))
    text, read = told["choices"][0]["message"]["content"], model.answer([model.example(page)])[0]
    assert json.loads(text) == read if read else text == raw == read.raw


def test_answers_are_held_to_a_schema(page):
    pytest.importorskip("xgrammar", reason="NO XGRAMMAR: schemas over HTTP are not tested")
    schema = dict(type="object", properties=dict(total=dict(type="string", enum=["7", "8"])), required=["total"],
                  additionalProperties=False)
    wanted = dict(type="json_schema", json_schema=dict(name="x", schema=schema))
    with s.running(s.make_app(Extractor.from_model("tiny-receipts"))) as address:
        status, told = s.post(address, s.image_request(page) | dict(response_format=wanted, max_tokens=30))
    assert status == 200 and json.loads(told["choices"][0]["message"]["content"])["total"] in "78"


# --- what is refused --------------------------------------------------------------------------------------------------
def upload(content, kind="png"):
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url=url))])])


def png(width, height):
    file = BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("content, status, words", [
    (lambda page: png(20_000, 10_000), 413, "more than 50,000,000 pixels"),
    (lambda page: png(8_000, 7_000), 413, "more than 50,000,000 pixels"),
    (lambda page: b"%PDF-1.7 no image", 400, "is no image"), (lambda page: b"", 400, "is no image"),
    (lambda page: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "is no image"),
    (lambda page: Path(page).read_bytes()[:-200], 400, "cannot read the image"),
    (lambda page: os.urandom(10_300_000), 413, "larger than 13,533,333 bytes")])
def test_what_is_no_image_or_too_large_is_refused(address, page, content, status, words):
    found, told = s.post(address, upload(content(page)))
    assert found == status and words in told["error"]["message"]


@pytest.mark.parametrize("change, status, words", [
    (dict(messages=[]), 400, "one of role user"), (dict(messages="hi"), 400, "one of role user"),
    (dict(messages=[dict(role="user", content="no image")]), 400, "0 images"),
    (dict(messages=[dict(role="user", content=[7])]), 400, "content must be"),
    (dict(messages=[dict(role="system", content=[dict(type="text")]), dict(role="user", content="x")]), 400,
     "needs a text"),
    (dict(stream=True), 400, "stream"), (dict(temperature=.5), 400, "greedy"), (dict(n=2), 400, "n must be 1"),
    (dict(max_tokens=-1), 400, "max_tokens is -1"), (dict(max_tokens=True), 400, "max_tokens is True"),
    (dict(model="gone"), 404, "no model 'gone'"), (dict(response_format=7), 400, "response_format"),
    (dict(tools=[1]), 400, "tools"), (dict(max_tokens=4000), 400, "4096 together")])
def test_what_cannot_be_done_is_said(address, page, change, status, words):
    found, told = s.post(address, s.image_request(page) | change)
    assert found == status and words in told["error"]["message"], told


def test_addresses_and_files_are_not_fetched(address):
    for url in ("http://127.0.0.1:1/x.png", "file:///etc/hostname", "/etc/hostname", "data:image/png,abc"):
        asked = dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url=url))])])
        assert s.post(address, asked)[0] == 400


def test_a_prompt_longer_than_the_context_is_refused(address, page):
    status, told = s.post(address, s.image_request(page, "What? "*4000))
    assert status == 400 and "4096 together" in told["error"]["message"]


def raw_call(address, method, path, body=None, **headers):
    host, port = address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers


def test_only_json_under_the_servers_own_name_is_heard(address):
    assert raw_call(address, "POST", "/v1/chat/completions", b"{}", Content_Type="text/plain")[0] == 415
    assert raw_call(address, "POST", "/v1/chat/completions", b"{", Content_Type="application/json")[0] == 400
    assert raw_call(address, "POST", "/v1/chat/completions", b"[]", Content_Type="application/json")[0] == 400
    assert raw_call(address, "GET", "/health", Host="evil.example")[0] == 400
    assert raw_call(address, "GET", "/docs")[0] == 404
    deep = b'{"a":' + b"["*100_000
    assert raw_call(address, "POST", "/v1/chat/completions", deep, Content_Type="application/json")[0] == 400


def test_a_key_is_wanted_where_one_is_set(page):
    with s.running(s.make_app(Slow(), key="open sesame")) as address:
        for key, status in ((None, 401), ("wrong", 401), ("ünïcode", 401), ("open sesame", 200)):
            if key and not key.isascii(): continue
            assert s.post(address, s.image_request(page), key)[0] == status
        assert raw_call(address, "GET", "/v1/models")[0] == 401
        assert raw_call(address, "GET", "/health")[0] == raw_call(address, "GET", "/")[0] == 200
        listed = raw_call(address, "GET", "/v1/models", Authorization="Bearer open sesame")[1]
        assert [row["id"] for row in json.loads(listed)["data"]] == ["slow"]


# --- a crowd ----------------------------------------------------------------------------------------------------------
def test_requests_that_wait_are_answered_together_and_none_is_crossed(page):
    slow = Slow()
    with s.running(s.make_app(slow, batch_size=4)) as address:
        found = s.load_test(address, [question(page, f"number {i}") for i in range(24)], clients=12)
    assert found["statuses"] == [200]*24
    assert [json.loads(text)["said"] for text in found["answers"]] == [f"number {i}" for i in range(24)]
    assert sum(slow.batches) == 24 and max(slow.batches) == 4 and len(slow.batches) < 20


def test_ten_times_too_many_are_told_so_and_nothing_is_lost_or_crossed(page):
    slow, asked = Slow(.2), [question(page, f"number {i}") for i in range(80)]
    with s.running(s.make_app(slow, s.Limits(queue=8), batch_size=4)) as address:
        found = s.load_test(address, asked, clients=80)
        health = json.loads(raw_call(address, "GET", "/health")[1])
        assert s.post(address, asked[0])[0] == 200, "and afterwards all is well"
    assert set(found["statuses"]) == {200, 429} and None not in found["statuses"]
    for i, (status, text) in enumerate(zip(found["statuses"], found["answers"])):
        assert (json.loads(text)["said"] == f"number {i}") if status == 200 else text is None
    assert found["statuses"].count(200) == sum(slow.batches) - 1 >= 8 and health["waiting"] == 0


def test_one_that_fails_does_not_take_others_with_it(page):
    with s.running(s.make_app(Slow(.1))) as address:
        asked = [question(page, "poison" if i == 3 else f"number {i}") for i in range(8)]
        found = s.load_test(address, asked, clients=8)
    assert [status == 500 for status in found["statuses"]] == [i == 3 for i in range(8)]


def test_a_request_gives_up_in_time_and_is_then_not_answered(page):
    slow = Slow(.6)
    with s.running(s.make_app(slow, s.Limits(seconds=.3), batch_size=1)) as address:
        found = s.load_test(address, [question(page, "late")]*4, clients=4)
    assert found["statuses"] == [504]*4 and sum(slow.batches) < 4


def test_a_client_that_sends_slowly_or_goes_away_holds_no_place(page):
    with s.running(s.make_app(Slow(), s.Limits(seconds=.5, queue=1))) as address:
        host, port = address.removeprefix("http://").split(":")
        stuck = socket.create_connection((host, int(port)))
        stuck.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                      b"Content-Length: 1000\r\n\r\n{")
        time.sleep(.1)
        assert s.post(address, question(page, "x"))[0] == 429
        time.sleep(.7)
        assert s.post(address, question(page, "x"))[0] == 200
        stuck.close()


# --- the verb ---------------------------------------------------------------------------------------------------------
def start(*words, **env):
    "The verb as a process; its first lines, read until it is ready"
    command = [sys.executable, "-m", "vlm_tutor.cli", "serve", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    lines = []
    while not lines or not lines[-1].startswith("stop") and lines[-1]: lines.append(process.stdout.readline())
    return process, "".join(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_those_who_wait_have_their_answer(runs, page, number, model):
    process, told = start(runs[0].path, "--port", "0", VLM_API_KEY="k")
    address = re.search(r"page +(http://127\.0\.0\.1:\d+)/", told)[1]
    assert "vllm serve" in told and "not run" in told and "k" not in re.findall(r"--api-key (\S+)", told)
    found, asked = [], s.image_request(page)
    waiting = threading.Thread(target=lambda: found.append(s.post(address, asked, "k")))
    while raw_call(address, "GET", "/health")[0] != 200: time.sleep(.1)
    waiting.start()
    while not json.loads(raw_call(address, "GET", "/health")[1])["waiting"] and waiting.is_alive(): time.sleep(.01)
    process.send_signal(number)
    waiting.join()
    out, err = process.communicate(timeout=60)
    assert found[0][0] == 200 and process.returncode == 0 and "stopped" in out and "Traceback" not in err
    assert found[0][1]["choices"][0]["message"]["content"] == model.answer([model.example(page)])[0].raw


def test_bad_input_is_refused_before_a_model_is_loaded(monkeypatch, runs):
    monkeypatch.setattr(s, "open_models", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.delenv("VLM_API_KEY", raising=False)
    with s.open_port() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(VlmError, match=f"port {port}: Address already in use"): s.serve("x", port=port)
    for said, options in (("queue is 0", dict(queue=0)), ("timeout is -1", dict(timeout=-1)),
                          ("there is no key", dict(host="0.0.0.0")), ("port is 70000", dict(port=70000)),
                          ("cannot listen on 'no.such.host'", dict(host="no.such.host", api_key="k"))):
        with pytest.raises(VlmError, match=said): s.serve(str(runs[0].path), **options)


def test_without_its_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(s, "find_spec", lambda name: None)
    with pytest.raises(VlmError, match=r"needs fastapi and uvicorn\. pip install 'vlm_tutor\[serve\]'"): s.serve("x")


# --- the page ---------------------------------------------------------------------------------------------------------
def test_the_page_asks_nobody_else(address):
    status, body, headers = raw_call(address, "GET", "/")
    text = body.decode()
    assert status == 200 and not re.search(r"(src|href)=[\"'](?!data:)|https?://|@import|url\(", text)
    assert "connect-src 'self'" in headers["Content-Security-Policy"]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to try the server's page in one")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_receipt_dropped_on_the_page_is_read(address, page, model, tmp_path, width):
    with Browser(tmp_path, width) as browser:
        browser.open(f"{address}/")
        browser.drop("file", page)
        browser.wait("document.getElementById('said').textContent.startsWith('Read in')")
        shown = browser.run("document.getElementById('found').textContent")
        wide = browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        raw = model.answer([model.example(page)])[0]
        assert (json.loads(shown) == raw if raw else shown == raw.raw) and wide == 0
        browser.drop("file", __file__)
        browser.wait("document.getElementById('said').textContent.includes('is no image')")
        assert browser.run("document.getElementById('said').className") == "bad" and browser.errors() == []


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to try the server's page in one")
def test_the_page_asks_for_a_key_when_one_is_wanted(page, tmp_path):
    with s.running(s.make_app(Slow(), key="k")) as address, Browser(tmp_path, 800) as browser:
        browser.open(f"{address}/")
        browser.wait("!document.getElementById('lock').hidden")
        browser.run("key.value = 'k', key.dispatchEvent(new Event('change'))")
        browser.wait("document.getElementById('model').options.length == 1")
        browser.drop("file", page)
        browser.wait("document.getElementById('found').textContent.includes('said')")


# --- the experiment ---------------------------------------------------------------------------------------------------
def test_what_became_of_requests_by_hand():
    found = dict(seconds=2., per_second=1., p50=1., p99=1., statuses=[200, 200, 200, 429, 504],
                 answers=["a", "c", "odd", None, None])
    row = s.load_row(found, list("abcde"))
    assert [row[n] for n in ("requests", "answered", "refused", "lost", "crossed", "different")] == [5, 3, 1, 1, 1, 2]


@pytest.mark.slow
def test_the_experiment_in_its_quick_mode(tmp_path):
    from vlm_tutor.bench import bench
    from vlm_tutor.core import write_yaml
    assert "serve" in bench()
    file = write_yaml(tmp_path/"quick.yaml", dict(requests=4, max_tokens=10, clients=[4], tight=2, overload=10))
    told = s.measure_load(file, tmp_path)
    assert set(told["tests"]) == {"1", "4", "overload"}
    for row in told["tests"].values(): assert row["lost"] == row["crossed"] == row["different"] == 0
    over = told["tests"]["overload"]
    assert over["requests"] == 20 == over["answered"] + over["refused"] and over["refused"] > 0
    with pytest.raises(VlmError, match="has no points"): bench("serve", points=["8"], work=str(tmp_path))
