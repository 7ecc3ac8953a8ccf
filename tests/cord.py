"""A data set in the layout of naver-clova-ix/cord-v2: file names, columns and the JSON text, with small pictures."""
import io, json

FILES = dict(train="train-{:05}-of-{:05}-b4aaeceff1d90ecb.parquet", test="test-{:05}-of-{:05}-9c204eb3f4e11791.parquet",
             validation="validation-{:05}-of-{:05}-cc3c5779fe22e8ca.parquet")


def page(i, kind="PNG", size=(48, 36)):
    "The bytes of a picture, another one for each number"
    from PIL import Image
    file = io.BytesIO()
    image = Image.new("RGB", size, (i % 256, i // 256 % 256, 99))
    image.save(file, kind)
    return file.getvalue()


def truth(i):
    "What `gt_parse` says of receipt `i`; like the real ones, its menu is a list or a single object"
    item = dict(nm=f"Nasi {i}", cnt="1 x", price=f"{i},000")
    return dict(menu=item if i % 3 == 2 else [item, dict(nm="Teh", price="5,000", sub=dict(nm="Es"))],
                sub_total=dict(subtotal_price=f"{i},000"), total=dict(total_price=f"{i + 5},000"))


def row(i, split):
    "A row as the hub has it"
    meta = dict(version="2.0.0", split=split, image_id=i, image_size=dict(width=48, height=36))
    text = json.dumps(dict(gt_parse=truth(i), meta=meta, valid_line=[dict(words=[dict(text="Nasi")], group_id=i)],
                           roi=dict(x1=1), repeating_symbol=[], dontcare=[]))
    return dict(image=dict(bytes=page(i), path=f"receipt_{i:05}.png"), ground_truth=text)


def make_cord(folder, shards=2, **counts):
    "Write parquet files with `datasets`, as `push_to_hub` does, and the two files beside them"
    from datasets import Dataset, Features, Image, Value, disable_progress_bars
    disable_progress_bars()
    columns, at = Features(image=Image(), ground_truth=Value("string")), 0
    (folder / "data").mkdir(parents=True)
    for split, n in (counts or dict(train=5, validation=2, test=2)).items():
        data = Dataset.from_list([row(at + i, split) for i in range(n)], features=columns)
        parts = shards if split == "train" else 1
        for k in range(parts):
            data.shard(parts, k, contiguous=True).to_parquet(folder / "data" / FILES[split].format(k, parts))
        at += n
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return folder


def short_receipts(folder, n):
    "A saved data set of `n` receipts a split whose answers are a few tokens long; its folder"
    from vlm_tutor.core import atomic_write, read_json_file
    from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format
    save_cord_dataset_in_sharegpt_format(folder, n=n)
    for file in folder.glob("cord*.json"):
        rows = read_json_file(file)
        for i, row in enumerate(rows): row["messages"][1]["content"] = json.dumps(dict(total=str(i) * (i + 1)))
        atomic_write(file, json.dumps(rows))
    return folder


def shop_heads(folder, **counts):
    "A saved data set of receipts' first lines; the answer is the shop's name, which a short run begins to learn"
    from vlm_tutor.core import Example
    from vlm_tutor.receipts import make_split_receipt
    from vlm_tutor.sharegpt import write_splits
    parts = {split: [] for split in counts}
    for split, n in counts.items():
        for i in range(n):
            receipt, path = make_split_receipt(i, split), folder / f"{split}-{i}.png"
            receipt.image.crop((0, 0, receipt.image.width, 48)).save(path)
            answer = json.dumps(dict(shop=receipt.text.splitlines()[0]))
            parts[split].append(Example(f"{split}-{i}", [str(path)], "Read the name of the shop as JSON.", answer))
    write_splits(folder / "shops", "shops", parts)
    return folder / "shops"
