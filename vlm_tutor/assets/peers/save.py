"""The worker for this package's own way to save a data set: `vlm save-dataset-in-sharegpt-format`, as a library."""
from meter import Meter
meter = Meter()
import datasets, pyarrow.parquet # noqa: what the engine imports later, so that it is not counted
from saved import look
from vlm_tutor.sharegpt import save_dataset_in_sharegpt_format

job = meter.start()
save_dataset_in_sharegpt_format(job['output'], job['data'], name=job['dataset'], prompt='Read the page as JSON.')
meter.stop()
meter.finish(**look(job))
