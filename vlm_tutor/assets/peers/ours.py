"""The worker for this package's own engine: `vlm train` and `vlm predict`, called as a library."""
from meter import Meter
meter = Meter()
import peft, torch, transformers.trainer # noqa: what the engine imports later, so that it is not counted
import vlm_tutor.collate, vlm_tutor.lora, vlm_tutor.tiny # noqa
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, read_jsonl
from vlm_tutor.predict import predict
from vlm_tutor.train import train

job = meter.start()
if job['task'] == 'predict':
    config = load_config(job['config'])
    run = RunFolder.create(config.output_dir, as_dict(config))
    predict(config.output_dir, 'vanilla-model', batch_size=job['batch'], device=job['device'])
    rows = read_jsonl(run.predictions('vanilla-model'))
    meter.finish(answers={row['image']: row['raw'] for row in rows} and [r['raw'] for r in sorted(rows, key=lambda r: r['id'])])
else:
    meter.watch_trainer()
    train(job['config'], device=job['device'])
    meter.finish()
