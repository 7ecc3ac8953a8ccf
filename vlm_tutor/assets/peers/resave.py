"""A plain loop over a data set that decodes every image and saves it anew, as most tutorials write it."""
from meter import Meter
meter = Meter()
import json, os
from datasets import load_dataset
from saved import look


def save(job):
    "Images and one JSON file"
    kind, rows = job['settings']['kind'], []
    os.makedirs(os.path.join(job['output'], 'images'))
    for i, row in enumerate(load_dataset(job['data'], split='train', streaming=True)):
        path = f"images/{i:05}.{'jpg' if kind == 'JPEG' else 'png'}"
        row['image'].save(os.path.join(job['output'], path), kind)
        answer = json.dumps(json.loads(row['ground_truth'])['gt_parse'], ensure_ascii=False)
        rows.append(dict(messages=[dict(role='user', content='<image>Read the page as JSON.'),
                                   dict(role='assistant', content=answer)], images=[path]))
    with open(os.path.join(job['output'], f"{job['dataset']}.json"), 'w') as file:
        json.dump(rows, file, ensure_ascii=False, indent=2)


job = meter.start()
save(job)
meter.stop()
meter.finish(**look(job, pixels=job['settings']['kind'] == 'PNG'))
