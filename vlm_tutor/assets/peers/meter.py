"""What the workers of `vlm bench` share: a job on the command line, a meter, one line of JSON at the end.

A worker imports everything it needs, calls `start`, trains, and calls `finish`. Standard library until then."""
import json, os, sys, time
from importlib import metadata

PACKAGES = ('torch', 'torchvision', 'transformers', 'peft', 'accelerate', 'datasets', 'trl', 'llamafactory',
            'donut-python', 'zss', 'numpy')


def status(name):
    "A line of this process's status in MiB, such as VmRSS; None where there is no /proc"
    try: lines = open('/proc/self/status').read().splitlines()
    except OSError: return None
    return next(int(line.split()[1])/1024 for line in lines if line.startswith(name))


def peak():
    "Most memory this process has held, in MiB"
    if (found := status('VmHWM')) is not None: return found
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)


def forget_peak():
    "Let the peak begin at what is held now; where that is forbidden, the peak of the imports stays in it"
    try: open('/proc/self/clear_refs', 'w').write('5')
    except OSError: pass


def cpu_seconds():
    "Processor time of this process, all its threads and its finished children"
    try: import resource
    except ImportError: return sum(os.times()[:4]) # in steps of 10 ms
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Meter:
    "Counts processor time, wall time and memory from the end of the imports on, and after every step"
    def __init__(self):
        self.job = json.loads(open(sys.argv[1]).read())
        self.out = os.fdopen(os.dup(1), 'w')
        os.dup2(2, 1) # what an engine prints is for the log
        self.marks, self.losses = [], []

    def start(self):
        "Everything is imported: begin to count"
        self.gpu, self.total = self.job['device'] == 'cuda', None
        if self.job['task'] not in ('save', 'score'):
            import torch
            torch.set_num_threads(self.job['threads'])
            if self.gpu: torch.zeros(1, device='cuda'), torch.cuda.reset_peak_memory_stats()
        forget_peak()
        self.imports, self.held = time.time() - self.job['began'], status('VmRSS') or peak()
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()
        return self.job

    def now(self): return [round(cpu_seconds() - self.cpu, 4), round(time.perf_counter() - self.wall, 4)]

    def watch_trainer(self):
        "Note the time after every step, and every loss, of whatever transformers Trainer is made from now on"
        import transformers.trainer as trainer
        meter = self
        class Notes(trainer.TrainerCallback):
            def on_train_begin(self, *_, **__): meter.marks.append(meter.now())
            def on_step_end(self, *_, **__): meter.marks.append(meter.now())
            def on_log(self, args, state, control, logs=None, **_):
                if 'loss' in (logs or {}): meter.losses.append(float(logs['loss']))
        trainer.DEFAULT_CALLBACKS.append(Notes())

    def stop(self):
        "What follows does not count"
        self.total, self.memory = self.now(), dict(rss=round(peak() - self.held, 1))

    def finish(self, **facts):
        "Stop counting and hand in the one line"
        if self.total is None: self.stop()
        total, memory = self.total, self.memory
        if self.gpu:
            import torch
            memory['gpu'] = round(torch.cuda.max_memory_allocated()/2**20, 1)
        found = {name: version(name) for name in PACKAGES if version(name)}
        line = dict(import_seconds=round(self.imports, 3), total=total, marks=self.marks, losses=self.losses,
                    memory=memory, versions=dict(python=sys.version.split()[0]) | found) | facts
        print(json.dumps(line), file=self.out, flush=True)


def version(name):
    "The installed version of a package, or None"
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None


def records(job, split='train'):
    "Question, answer and image of every row of a ShareGPT file"
    name = job['dataset'] + ('' if split == 'train' else f'_{split}')
    rows = json.load(open(os.path.join(job['data'], f'{name}.json')))[:job['rows']]
    for row in rows:
        question, answer = (message['content'] for message in row['messages'])
        yield question.replace('<image>', ''), answer, os.path.join(job['data'], row['images'][0])
