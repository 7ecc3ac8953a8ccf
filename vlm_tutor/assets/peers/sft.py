"""A peer: TRL's SFTTrainer, told to learn the answer only and to cut nothing; all else as it comes."""
from meter import Meter, records
meter = Meter()
import datasets, torch # noqa
from peft import PeftModel
from processor import load_processor
from transformers import AutoModelForImageTextToText
from trl import SFTConfig, SFTTrainer


def dataset(job):
    "Prompt, completion and images, as TRL wants them for loss on the completion"
    rows = [dict(prompt=[dict(role='user', content=question)], completion=[dict(role='assistant', content=answer)],
                 images=[path]) for question, answer, path in records(job)]
    return datasets.Dataset.from_list(rows).cast_column('images', datasets.List(datasets.Image()))


def arguments(job):
    "The job in TRL's form; `checkpointing` None leaves TRL's own choice"
    extra = {} if job['checkpointing'] is None else dict(gradient_checkpointing=job['checkpointing'])
    return SFTConfig(
        output_dir=job['output'], per_device_train_batch_size=job['batch'], max_steps=job['max_steps'],
        gradient_accumulation_steps=job['accumulation'], learning_rate=job['learning_rate'],
        num_train_epochs=job['epochs'], lr_scheduler_type='constant', logging_steps=1, save_strategy='no',
        report_to='none', seed=job['seed'], use_cpu=job['device'] == 'cpu', bf16=job['dtype'] == 'bfloat16',
        train_sampling_strategy='sequential' if job['ordered'] else 'random', disable_tqdm=True,
        completion_only_loss=True, max_length=None, **extra)


job = meter.start()
meter.watch_trainer()
model = AutoModelForImageTextToText.from_pretrained(job['model'], dtype=job['dtype'])
model = PeftModel.from_pretrained(model, job['adapter'], is_trainable=True)
trainer = SFTTrainer(model, arguments(job), train_dataset=dataset(job), processing_class=load_processor(job))
trainer.train()
model.save_pretrained(job['output'])
meter.finish()
