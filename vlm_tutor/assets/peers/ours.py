"""The worker for this package's own engine: `vlm train` and `vlm predict`, called as a library."""
from meter import Meter
meter = Meter()
import peft, torch, transformers.trainer # noqa: what the engine imports later, so that it is not counted
import vlm_tutor.collate, vlm_tutor.lora, vlm_tutor.tiny # noqa
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, read_jsonl
from vlm_tutor.predict import predict
from vlm_tutor.train import train


def answers(job):
    "Predict the test rows of a run that was never trained, in the order of the file"
    config = load_config(job['config'])
    run = RunFolder.create(config.output_dir, as_dict(config))
    predict(config.output_dir, 'vanilla-model', batch_size=job['batch'], device=job['device'])
    rows = sorted(read_jsonl(run.predictions('vanilla-model')), key=lambda row: row['id'])
    return [row['raw'] for row in rows]


job = meter.start()
if job['task'] == 'predict': meter.finish(answers=answers(job))
else:
    meter.watch_trainer()
    train(job['config'], device=job['device'])
    meter.finish()
