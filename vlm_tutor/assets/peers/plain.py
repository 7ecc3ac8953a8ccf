"""A peer: transformers' Trainer with a PEFT adapter and nothing else, written as their documentation teaches it.

With the task "predict" it is a plain loop over `generate`."""
from meter import Meter, records
meter = Meter()
import torch
from PIL import Image
from peft import PeftModel
from processor import load_processor
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

IGNORE = -100


class Collator:
    "Rows to one padded batch; only the answer is learned"
    def __init__(self, processor): self.processor = processor

    def __call__(self, rows):
        chats = [[dict(role='user', content=[dict(type='image'), dict(type='text', text=question)]),
                  dict(role='assistant', content=[dict(type='text', text=answer)])] for question, answer, _ in rows]
        batch = self.processor(text=self.processor.apply_chat_template(chats), padding=True, padding_side='right',
                               images=[Image.open(path).convert('RGB') for *_, path in rows], return_tensors='pt')
        labels = torch.full_like(batch['input_ids'], IGNORE)
        for i, (_, answer, _) in enumerate(rows):
            learned = len(self.processor.tokenizer(answer + '<|im_end|>\n')['input_ids'])
            end = int(batch['attention_mask'][i].sum())
            labels[i, end - learned:end] = batch['input_ids'][i, end - learned:end]
        return batch | dict(labels=labels)


def arguments(job):
    "The job in the Trainer's form"
    extra = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return TrainingArguments(
        output_dir=job['output'], per_device_train_batch_size=job['batch'], max_steps=job['max_steps'],
        gradient_accumulation_steps=job['accumulation'], learning_rate=job['learning_rate'],
        num_train_epochs=job['epochs'], lr_scheduler_type='constant', logging_steps=1, save_strategy='no',
        report_to='none', seed=job['seed'], use_cpu=job['device'] == 'cpu', bf16=job['dtype'] == 'bfloat16',
        train_sampling_strategy='sequential' if job['ordered'] else 'random', remove_unused_columns=False,
        disable_tqdm=True, **extra if job['checkpointing'] else {})


def load(job):
    "The frozen model"
    return AutoModelForImageTextToText.from_pretrained(job['model'], dtype=job['dtype']).to(job['device'])


def train(job):
    "Fine-tune the adapter and save it"
    model = PeftModel.from_pretrained(load(job), job['adapter'], is_trainable=True)
    trainer = Trainer(model, arguments(job), train_dataset=list(records(job)),
                      data_collator=Collator(load_processor(job)))
    trainer.train()
    model.save_pretrained(job['output'])


@torch.inference_mode()
def predict(job):
    "Greedy answers, a batch at a time, in the order of the file"
    model, processor, rows, answers = load(job).eval(), load_processor(job), list(records(job, 'test')), []
    for i in range(0, len(rows), job['batch']):
        part = rows[i:i + job['batch']]
        chats = [[dict(role='user', content=[dict(type='image'), dict(type='text', text=q)])] for q, *_ in part]
        inputs = processor(text=processor.apply_chat_template(chats, add_generation_prompt=True), padding=True,
                           images=[Image.open(path).convert('RGB') for *_, path in part], padding_side='left',
                           return_tensors='pt').to(model.device)
        ids = model.generate(**inputs, max_new_tokens=job['max_new_tokens'], do_sample=False)
        answers += processor.batch_decode(ids[:, inputs['input_ids'].shape[1]:], skip_special_tokens=True)
    return [answer.rstrip('\n') for answer in answers]


job = meter.start()
if job['task'] == 'predict': meter.finish(answers=predict(job))
else:
    meter.watch_trainer()
    train(job)
    meter.finish()
