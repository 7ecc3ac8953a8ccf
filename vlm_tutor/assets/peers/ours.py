"""The worker for this package's own engine: `vlm train` and `vlm predict`, called as a library."""
from meter import Meter
meter = Meter()
import peft, torch, transformers # noqa: what the engine imports later, so that it is not counted
import vlm_tutor.engine, vlm_tutor.features, vlm_tutor.tiny # noqa
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, read_jsonl
from vlm_tutor.predict import predict
from vlm_tutor.train import Watch, train


def answers(job):
    "Predict the test rows of a run that was never trained, in the order of the file"
    config = load_config(job['config'])
    run = RunFolder.create(config.output_dir, as_dict(config))
    predict(config.output_dir, 'vanilla-model', batch_size=job['batch'], device=job['device'])
    rows = sorted(read_jsonl(run.predictions('vanilla-model')), key=lambda row: row['id'])
    return [row['raw'] for row in rows]


def watch_steps():
    "Note the time before the first step and after every one, and every loss"
    begin, step = Watch.__init__, Watch.step
    def noted_begin(self, *args, **keys):
        begin(self, *args, **keys)
        meter.marks.append(meter.now())
    def noted_step(self, told):
        step(self, told)
        meter.marks.append(meter.now())
        meter.losses.append(told['loss'])
    Watch.__init__, Watch.step = noted_begin, noted_step


job = meter.start()
if job['task'] == 'predict': meter.finish(answers=answers(job))
else:
    watch_steps()
    train(job['config'], device=job['device'])
    meter.finish()
