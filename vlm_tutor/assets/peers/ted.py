"""The worker for this package's nTED accuracy: `vlm_tutor.metrics`, as a library."""
from meter import Meter
meter = Meter()
from pairs import read_pairs
from vlm_tutor.metrics import nted_accuracy

job = meter.start()
found = [nted_accuracy(*pair) for pair in read_pairs(job)]
meter.finish(answers=[f'{value:.9f}' for value in found])
