"""The worker for Donut's own evaluator, as the package `donut-python` installs it.

Its module also holds a data set for training, which imports torch, datasets and transformers. Scoring needs none of
them, so empty modules stand in their places and the module is loaded without its package."""
from meter import Meter
meter = Meter()
import importlib.util, sys
from importlib import metadata
from types import ModuleType
from pairs import read_pairs


def evaluator():
    "The evaluator, its code untouched"
    for name, words in {'torch': ['Tensor'], 'torch.utils': [], 'torch.utils.data': ['Dataset'], 'transformers': [],
                        'datasets': ['load_dataset'], 'transformers.modeling_utils': ['PreTrainedModel']}.items():
        sys.modules[name] = module = ModuleType(name)
        for word in words: setattr(module, word, object)
    found = next(file for file in metadata.files('donut-python') if str(file).endswith('donut/util.py'))
    spec = importlib.util.spec_from_file_location('donut_util', found.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.JSONParseEvaluator()


judge = evaluator()
job = meter.start()
found = [judge.cal_acc(*pair) for pair in read_pairs(job)]
meter.finish(answers=[f'{value:.9f}' for value in found])
