"""A peer: LLaMA-Factory, called as its command line calls it."""
from meter import Meter
meter = Meter()
import transformers.trainer # noqa
from llamafactory.train.tuner import run_exp


def arguments(job):
    "The job under LLaMA-Factory's keys; `checkpointing` None leaves its own choice"
    keys = dict(
        stage='sft', do_train=True, finetuning_type='lora', lora_target='all', template='qwen2_vl',
        model_name_or_path=job['model'], adapter_name_or_path=job['adapter'], dataset=job['dataset'],
        dataset_dir=job['data'], max_samples=job['rows'], output_dir=job['output'], overwrite_output_dir=True,
        per_device_train_batch_size=job['batch'], gradient_accumulation_steps=job['accumulation'],
        learning_rate=job['learning_rate'], num_train_epochs=job['epochs'], max_steps=job['max_steps'],
        lr_scheduler_type='constant', logging_steps=1, save_strategy='no', report_to='none', seed=job['seed'],
        use_cpu=job['device'] == 'cpu', bf16=job['dtype'] == 'bfloat16', disable_shuffling=job['ordered'],
        disable_tqdm=True, image_max_pixels=job['image_max_pixels'])
    if job['checkpointing'] is not None: keys['disable_gradient_checkpointing'] = not job['checkpointing']
    return keys


job = meter.start()
meter.watch_trainer()
run_exp(arguments(job))
meter.finish()
