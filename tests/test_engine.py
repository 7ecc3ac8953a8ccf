"The engine against plain transformers, against interruption, and against itself in pieces and processes"
import json, os, pickle, random, signal, subprocess, sys, time

import pytest
import torch
from transformers import get_scheduler

from vlm_tutor import features
from vlm_tutor.collate import image_size
from vlm_tutor.config import check_kernels, load_config
from vlm_tutor.core import (RunFolder, VlmError, atomic_write, content_hash, read_json_file, read_jsonl,
                            set_seed)
from vlm_tutor.engine import (Engine, LeanLoss, PlainLoss, Visit, choose_loss, epoch_order, last_checkpoint,
                              read_tensors, shard, step_rows)
from vlm_tutor.lean import attend
from vlm_tutor.lora import build_adapter
from vlm_tutor.predict import adapter_hash, load_run_model, split_examples
from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format
from vlm_tutor.train import BEST, Rows, augmentation_of, events, train

SWITCHES = ("cache_features", "lean_forward", "answer_only_logits", "group_by_length")
BASE = dict(num_train_epochs=2, per_device_train_batch_size=4, logging_steps=1, save_strategy="steps", save_steps=1,
            eval_strategy="no", learning_rate=4e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Ten receipts with answers of very different length"
    folder = tmp_path_factory.mktemp("data")
    save_cord_dataset_in_sharegpt_format(folder, n=10)
    for file in folder.glob("cord*.json"):
        rows = read_json_file(file)
        for i, row in enumerate(rows): row["messages"][1]["content"] = json.dumps(dict(total=str(i) * (1 + i*i // 2)))
        atomic_write(file, json.dumps(rows))
    return folder


def options(data, path, **more): return BASE | dict(data=str(data), output_dir=str(path)) | more


def losses(path): return [row["loss"] for row in events(RunFolder(path), "step")]


def plain_run(data, seed=42):
    "The same fine-tune by hand: transformers' own forward on padded batches with pixels, PEFT, AdamW, cosine"
    config = load_config("tiny", options(data, "unused", seed=seed))
    model, preprocess, _ = load_run_model(config)
    examples = split_examples(config, "train")
    set_seed(seed)
    model = build_adapter(model, config).train()
    trained, steps = [p for p in model.parameters() if p.requires_grad], 6
    optimizer, found = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay), []
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, -(-steps*config.warmup_ratio // 1), steps)
    for step in range(steps):
        rows = [preprocess.encode(examples[i]) for i in step_rows(step, len(examples), 4, seed)]
        loss = model(**preprocess.collate(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def by_hand(data): return plain_run(data)


@pytest.fixture(scope="module")
def ours(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "run"
    train("tiny", overrides=options(data, path))
    return RunFolder(path)


IDS = lambda on: "+".join(on) or "none"


@pytest.mark.parametrize("on", [(), *((switch,) for switch in SWITCHES), SWITCHES], ids=IDS)
def test_every_switch_keeps_the_losses_of_plain_transformers(data, by_hand, tmp_path, on):
    train("tiny", overrides=options(data, tmp_path / "run", **{switch: switch in on for switch in SWITCHES}))
    assert losses(tmp_path / "run")[:3] == pytest.approx(by_hand[:3], rel=1e-4)
    assert losses(tmp_path / "run") == pytest.approx(by_hand, rel=2e-2)


@pytest.mark.parametrize("change", [dict(flash_attn="sdpa"), dict(flash_attn="disabled"),
                                    pytest.param(dict(torch_compile=True), marks=pytest.mark.slow)], ids=str)
def test_every_kernel_keeps_the_losses_of_plain_transformers(data, by_hand, tmp_path, change):
    train("tiny", overrides=options(data, tmp_path / "run", **change))
    assert losses(tmp_path / "run")[:3] == pytest.approx(by_hand[:3], rel=1e-4)


def test_torch_compile_reaches_every_layer(data):
    config = load_config("tiny", options(data, "unused", torch_compile=True))
    model = adapted(config)
    assert "torch_compile" in choose_loss(model, None, config)[1]
    layers = model.get_base_model().model.language_model.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)


def test_a_tower_on_a_cpu_attends_head_by_head_and_its_features_stay_the_same(data, loaded, monkeypatch):
    config, preprocess, _ = loaded
    model, image = adapted(config), split_examples(config, "train")[0].image
    store, calls, own = features.Features(model, preprocess), [], features.attend_all
    monkeypatch.setattr(features, "attend_all", lambda *given: calls.append(given[0].shape) or own(*given))
    pixels, grid = store.patches(image)
    tower = model.get_base_model().model.visual
    with torch.no_grad(): stock = model.get_base_model().model.get_image_features(pixels, grid).pooler_output
    assert not calls, "outside, the model attends as it did"
    torch.testing.assert_close(store.look(pixels, grid), torch.cat(tuple(stock)), rtol=1e-4, atol=1e-4)
    assert len(calls) == len(tower.blocks)


@pytest.mark.parametrize("key", ["flash_attn=fa2", "enable_liger_kernel=true"])
def test_kernels_that_are_not_there_are_refused_before_the_model_is_loaded(key):
    with pytest.raises(VlmError, match="needs a GPU"):
        load_run_model(load_config("cord", [key, "model_name_or_path=no/where"]), device="cpu")
    with pytest.raises(VlmError, match="pip install"): check_kernels(load_config("cord", [key]), "cuda")


def test_attention_by_blocks_in_16_bits_is_as_exact_as_that_of_pytorch():
    "Distance from the result in 64 bits, whatever the length of the row, for output and gradients"
    for length in (1, 63, 130, 1100):
        torch.manual_seed(length)
        wide = [torch.randn(length, n, 64, dtype=torch.double, requires_grad=True) for n in (6, 2, 2)]
        g = torch.randn(length, 6, 64, dtype=torch.double)
        def results(kernel, dtype):
            inputs = [t.detach().to(dtype).requires_grad_() for t in wide]
            out = attend(*inputs, [length], kernel=kernel).view_as(g)
            return [out, *torch.autograd.grad(out, inputs, g.to(dtype))]
        true = results("sdpa", torch.double)
        off = lambda kernel: [((a - b).norm() / b.norm().clamp(min=1)).item()
                              for a, b in zip(results(kernel, torch.bfloat16), true)]
        for ours, theirs in zip(off("disabled"), off("sdpa")): assert ours <= max(2*theirs, 8e-3)


@pytest.mark.slow
def test_the_last_loss_lies_among_five_plain_seeds(data, ours):
    last = [plain_run(data, seed)[-1] for seed in range(42, 47)]
    assert min(last)*.99 <= losses(ours.path)[-1] <= max(last)*1.01


@pytest.fixture(scope="module")
def loaded(data):
    config = load_config("tiny", options(data, "unused"))
    model, preprocess, _ = load_run_model(config)
    return config, preprocess, [preprocess.encode(e) for e in split_examples(config, "train")[:4]]


def adapted(config, dtype=torch.float32):
    from vlm_tutor.tiny import load_model
    set_seed(0)
    model = build_adapter(load_model("tiny-receipts", dtype=dtype), config)
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.05)
    return model


@pytest.mark.parametrize("kind", ["plain", "lean"])
def test_saving_memory_changes_no_gradient(loaded, kind):
    config, preprocess, rows = loaded
    model, found = adapted(config).train(), []
    loss = PlainLoss(model, preprocess) if kind == "plain" else LeanLoss(model)
    while True:
        model.zero_grad()
        loss(rows).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        if not loss.save_memory(): break
    assert len(found) == (2 if kind == "plain" else 3)
    assert all(torch.allclose(found[0], other, rtol=1e-4, atol=1e-4*found[0].abs().max()) for other in found[1:])


def test_a_vision_tower_that_learns_gets_the_gradient_of_plain_transformers(loaded):
    config, preprocess, rows = loaded
    model = adapted(load_config(config, ["freeze_vision_tower=false", "freeze_multi_modal_projector=false"])).eval()
    found = []
    for loss in (PlainLoss(model, preprocess, sparse=False), LeanLoss(model)):
        model.zero_grad()
        loss(rows).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any("visual" in name for name in found[0])
    assert all(torch.allclose(g, found[1][n], rtol=1e-3, atol=1e-4*g.abs().max()) for n, g in found[0].items())


def test_an_overflow_in_16_bits_skips_the_step_and_lowers_the_scale(loaded):
    config, preprocess, rows = loaded
    engine = Engine(adapted(config, torch.float16), preprocess, config, n=4)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.**60)
    engine.steps_done = 1  # the first step's rate is zero
    before = {name: p.detach().clone() for name, p in engine.named.items()}
    engine.step(rows)
    assert all(torch.equal(p, before[name]) for name, p in engine.named.items())
    assert engine.scaler.get_scale() == 2.**59
    engine.scaler, engine.steps_done = torch.amp.GradScaler("cpu", init_scale=2.**8), 1
    told = engine.step(rows)
    assert not any(torch.equal(p, before[n]) for n, p in engine.named.items()) and 0 < told["grad_norm"] < 1e4


def test_epochs_are_permutations_that_depend_on_the_seed():
    for n, seed in ((1, 0), (7, 3), (100, 5)):
        orders = [epoch_order(n, epoch, seed) for epoch in range(3)]
        assert all(sorted(order) == list(range(n)) for order in orders)
        assert n < 7 or orders[0] != orders[1] != epoch_order(n, 1, seed + 1)


def test_loader_processes_change_nothing(data, ours, tmp_path):
    for more in (dict(dataloader_num_workers=2), dict(dataloader_num_workers=1, cache_features=False)):
        path = tmp_path / str(len(more))
        train("tiny", overrides=options(data, path, **more))
        if len(more) == 1: assert adapter_hash(path / "adapter") == adapter_hash(ours.adapter)
        assert losses(path) == pytest.approx(losses(ours.path), rel=1e-3)


RUN = "import json, sys; from vlm_tutor.train import train; train('tiny', overrides=json.loads(sys.argv[1]))"


def start(given, *before): return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(given)],
                                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_saving_and_resumed_to_the_same_bytes(data, ours, tmp_path):
    run, rng, kills = RunFolder(tmp_path / "run"), random.Random(0), 0
    for _ in range(3):
        process = start(options(data, run.path))
        begun = len(list(run.checkpoints.glob("checkpoint-*")))
        while process.poll() is None and not list(run.checkpoints.glob(".*.tmp")) \
                and len(list(run.checkpoints.glob("checkpoint-*"))) == begun: time.sleep(.0005)
        time.sleep(rng.random()*.02)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2 and not run.adapter.exists()
    train("tiny", overrides=options(data, run.path))
    assert adapter_hash(run.adapter) == adapter_hash(ours.adapter)
    same = ("event", "step", "epoch", "loss", "grad_norm", "learning_rate")
    assert [[row[k] for k in same] for row in events(run, "step")] == \
        [[row[k] for k in same] for row in events(ours, "step")]
    one, other = (last_checkpoint(r) / "optimizer.safetensors" for r in (run, ours))
    assert one.read_bytes() == other.read_bytes()


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer_state.json", "random-0.safetensors"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(data, tmp_path, name):
    run, trap = RunFolder(tmp_path / "run"), tmp_path / "executed"
    train("tiny", overrides=options(data, run.path, max_steps=2))
    for path in run.adapter.iterdir(): path.unlink()
    run.adapter.rmdir()
    (last_checkpoint(run) / name).write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(VlmError, match=name): train("tiny", overrides=options(data, run.path, max_steps=2))
    assert not trap.exists()


def test_features_on_file_that_were_tampered_with_are_refused(data, tmp_path):
    run = RunFolder(tmp_path / "run")
    train("tiny", overrides=options(data, run.path, max_steps=1))
    index = next((run.path / "features").glob("*.jsonl"))
    key = index.stem
    index.write_text(index.read_text().replace(key, "0"*16))
    for path in run.adapter.iterdir(): path.unlink()
    run.adapter.rmdir()
    with pytest.raises(VlmError, match=f"another model or image size .*now {key}"):
        train("tiny", overrides=options(data, run.path, max_steps=1))


TWO = """
import json, sys
import vlm_tutor.train as t
import vlm_tutor.engine as e
t.train('tiny', overrides=json.loads(sys.argv[1]))
"""


@pytest.mark.parametrize("fsdp", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_process_without_a_row_keeps_the_others_company(data, tmp_path, fsdp):
    "Nine rows, four a step: the last step leaves the second process without one"
    more, script = dict(max_samples=9, fsdp=fsdp, num_train_epochs=1), tmp_path / "two.py"
    train("tiny", overrides=options(data, tmp_path / "one", **more))
    script.write_text(TWO)
    given = options(data, tmp_path / "two", **more, per_device_train_batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
               json.dumps(given)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_learn_what_one_does(data, ours, tmp_path, fsdp):
    script, path = tmp_path / "two.py", tmp_path / "run"
    script.write_text(TWO)
    given = options(data, path, per_device_train_batch_size=2, fsdp=fsdp, eval_strategy="epoch",
                    disable_gradient_checkpointing=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(script), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("in 2 processes") == 1 and ("weights shared" in done.stdout) == fsdp
    assert losses(path) == pytest.approx(losses(ours.path), rel=1e-3)
    state = read_json_file(last_checkpoint(RunFolder(path)) / "trainer_state.json")
    assert state["processes"] == 2 and len(list(last_checkpoint(RunFolder(path)).glob("random-*"))) == 2
    assert state["memory"] == ("layers" if fsdp else "keep")


BEST_OF_TWO = """
import json, os, sys
import vlm_tutor.train as t
from vlm_tutor.core import content_hash
kept, keep, watches, start = [], t.keep_best, [], t.Watch.__init__
def noted(engine, run):
    kept.append(engine.steps_done)
    keep(engine, run)
def watched(self, *given, **more):
    start(self, *given, **more)
    watches.append(self)
t.keep_best, t.Watch.__init__ = noted, watched
t.train('tiny', overrides=json.loads(sys.argv[1]))
engine = watches[0].engine
weights = content_hash(*(p.numpy().tobytes() for _, p in sorted(engine.adapter().items())))
with open(f"{sys.argv[2]}/rank-{os.environ['RANK']}.json", 'w') as file:
    json.dump(dict(steps=engine.steps_done, kept=kept, judged=len(watches[0].judged), weights=weights), file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("metric, fsdp", [("field_f1", False), ("loss", False), ("field_f1", True)])
def test_two_processes_stop_at_one_step_and_one_writes_the_best(data, tmp_path, metric, fsdp):
    "A rate that rises until it spoils the model; the log says where the run must end and what must be kept"
    given = options(data, tmp_path / "run", per_device_train_batch_size=1, max_samples=8, max_steps=12,
                    fsdp=fsdp, eval_strategy="steps", eval_steps=1, eval_score_samples=2, save_strategy="no",
                    learning_rate=.05, lr_scheduler_type="constant_with_warmup", warmup_ratio=.9,
                    metric_for_best_model=metric,
                    load_best_model_at_end=True, early_stopping_patience=2)
    (tmp_path / "two.py").write_text(BEST_OF_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "two.py"), json.dumps(given), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (read_json_file(tmp_path / f"rank-{rank}.json") for rank in (0, 1))
    run = RunFolder(tmp_path / "run")
    scores = [row[metric] * (-1 if metric == "loss" else 1) for row in events(run, "validation")]
    best = [max(range(i + 1), key=scores.__getitem__) for i in range(len(scores))]  # the first of equals
    ends = [i for i in range(len(scores)) if i - best[i] >= 2]
    assert ends == [len(scores) - 1], "two evaluations without a better one end the run, and nothing before"
    assert first["steps"] == second["steps"] == len(scores) == events(run, "done")[0]["step"] < 12
    assert first["judged"] == second["judged"] == len(scores)
    assert first["kept"] == [i + 1 for i in range(len(scores)) if best[i] == i] and second["kept"] == []
    assert first["weights"] == second["weights"], "both hold the best weights in the end"
    saved = read_tensors(run.checkpoints / BEST)
    assert first["weights"] == content_hash(*(tensor.numpy().tobytes() for _, tensor in sorted(saved.items())))


SHORT = """
import json, os, sys
import torch
from vlm_tutor.core import VlmError
from vlm_tutor.engine import Engine, LeanLoss
from vlm_tutor.train import train
Engine._careful, enough = True, LeanLoss.__call__
def short(self, rows):
    if os.environ['RANK'] == '1' and len(rows) > 1: raise torch.OutOfMemoryError('too many rows')
    return enough(self, rows)
LeanLoss.__call__ = short
try: train('tiny', overrides=json.loads(sys.argv[1]))
except VlmError as error: sys.exit(str(error))
"""


@pytest.mark.parametrize("fsdp", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_that_runs_out_in_one_process(data, ours, tmp_path, fsdp):
    "Alone it takes smaller pieces; where weights are shared it must end the run, for the others would wait for it"
    script, path = tmp_path / "two.py", tmp_path / "run"
    script.write_text(SHORT)
    given = options(data, path, per_device_train_batch_size=2, fsdp=fsdp, auto_find_batch_size=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
               json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode != 0) == fsdp, done.stderr[-2000:]
    if fsdp: assert "no process can take smaller pieces" in done.stderr
    else: assert losses(path) == pytest.approx(losses(ours.path), rel=1e-3)


def test_sharing_weights_really_shares_them(loaded, tmp_path):
    "One process in a group of one: the layers hold distributed tensors, the adapter plain ones, the loss is the same"
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    config, _, rows = loaded
    model = adapted(config)
    wanted = LeanLoss(model)(rows).item()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        shard(model)
        layer = model.get_base_model().model.language_model.layers[0]
        assert all(isinstance(p, DTensor) != p.requires_grad for p in layer.parameters())
        loss = LeanLoss(model)(rows)
        loss.backward()
        assert loss.item() == pytest.approx(wanted, rel=1e-6)
    finally: dist.destroy_process_group()


def test_the_size_of_a_photo_on_its_side_is_that_of_the_upright_one(tmp_path):
    from PIL import Image
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (60, 20)).save(tmp_path / f"{turn}.jpg", exif=exif)
        from vlm_tutor.core import load_image
        assert image_size(tmp_path / f"{turn}.jpg") == load_image(tmp_path / f"{turn}.jpg").size[::-1]


# --- augmented twins of the above -------------------------------------------------------------------------------------
AUGMENTED = dict(augmentation="all", augmentation_strength=1.5, max_steps=4)


@pytest.fixture(scope="module", params=[None, 2], ids=["new each epoch", "two variants"])
def augmented(request, data, tmp_path_factory):
    "A run that was never interrupted, and its options"
    path = tmp_path_factory.mktemp("augmented") / "run"
    more = AUGMENTED | (dict(augmentation_variants=request.param) if request.param else {})
    train("tiny", overrides=options(data, path, **more))
    return RunFolder(path), more


def test_augmented_and_killed_and_resumed_to_the_same_bytes(data, augmented, tmp_path):
    whole, more = augmented
    run = RunFolder(tmp_path / "run")
    process = start(options(data, run.path, **more))
    while process.poll() is None and last_checkpoint(run) is None: time.sleep(.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not run.adapter.exists()
    train("tiny", overrides=options(data, run.path, **more))
    assert adapter_hash(run.adapter) == adapter_hash(whole.adapter) and losses(run.path) == losses(whole.path)
    one, other = (last_checkpoint(r) / "optimizer.safetensors" for r in (run, whole))
    assert one.read_bytes() == other.read_bytes()


def test_loader_processes_draw_the_same_disturbances(data, augmented, tmp_path):
    whole, more = augmented
    train("tiny", overrides=options(data, tmp_path / "run", **more, dataloader_num_workers=2))
    assert adapter_hash(tmp_path / "run" / "adapter") == adapter_hash(whole.adapter)


def test_features_of_variants_are_kept_and_equal_their_pixels(data, augmented, tmp_path):
    whole, more = augmented
    index = list((whole.path / "features").glob("*.jsonl"))
    assert len(index) == ("augmentation_variants" in more)
    if index: assert sum(row["image"].endswith(("-0", "-1")) for row in read_jsonl(index[0])) == 20
    train("tiny", overrides=options(data, tmp_path / "run", **more, cache_features=False))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.path), rel=1e-3)


def test_images_are_really_disturbed_and_anew_in_each_epoch(data, ours, augmented):
    whole, more = augmented
    assert losses(whole.path)[0] != pytest.approx(losses(ours.path)[0], rel=1e-3)
    config = load_config("tiny", options(data, "unused", **more))
    _, preprocess, _ = load_run_model(config)
    rows = Rows(split_examples(config, "train"), preprocess, augmentation=augmentation_of(config))
    seen = [[rows[Visit(i, epoch)]["pixel_values"] for i in range(10)] for epoch in range(4)]
    alike = lambda one, other: one.shape == other.shape and torch.equal(one, other)
    same = lambda a, b: sum(map(alike, seen[a], seen[b]))
    assert same(0, 1) < 5 and same(0, 2) < 5 or "augmentation_variants" in more
    if "augmentation_variants" in more: assert same(0, 2) == same(1, 3) == 10 > same(0, 1)


def test_an_augmentation_that_may_break_the_token_budget_is_refused_before_the_first_step(data, tmp_path):
    config = load_config("tiny", options(data, "unused"))
    _, preprocess, _ = load_run_model(config)
    longest = max(map(preprocess.length, split_examples(config, "train")))
    more = dict(augmentation="rotation,resolution", cutoff_len=longest)
    with pytest.raises(VlmError, match=rf"augmentation resolution may enlarge .+ beyond cutoff_len {longest}"):
        train("tiny", overrides=options(data, tmp_path / "run", **more))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    train("tiny", overrides=options(data, tmp_path / "run2", **more | dict(augmentation="rotation"), max_steps=1))


@pytest.mark.parametrize("more, said", [(dict(augmentation="rotation,flip"), "'flip' is refused for documents"),
                                        (dict(augmentation="al"), "unknown augmentation 'al'"),
                                        (dict(augmentation="blur", augmentation_strength=7), "up to 1.5")])
def test_a_wrong_augmentation_is_refused_before_anything_is_read(tmp_path, more, said):
    more |= dict(dataset_dir=str(tmp_path / "none"), output_dir=str(tmp_path / "run"))
    with pytest.raises(VlmError, match=said): train("tiny", overrides=more)
