"""Datasets for comparing loaders, and other loaders.

    data.py make CASE FOLDER                  writes a case's dataset in the format of every loader that takes it
    data.py load LOADER CASE FOLDER SAMPLES   takes so many samples; prints the time of the first batch, in Unix seconds

Cases: `jpeg` is pictures to normalised batches, `raw` is samples of 20 KB that are only stacked, `rows` is tables.
"""
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BATCH = {"jpeg": 64, "raw": 64, "rows": 1024}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIDE = 224
RAW_BYTES, RAW_SAMPLES = 20_480, 10_000
ROWS, FEATURES = 200_000, 32
PICTURES, DISTINCT = 20_000, 2_000
WORKERS = 2
SHARD_BYTES = 64 << 20


# Making datasets.


def pictures():
    """JPEG of 13 to 43 KB: waves of several lengths, as photographs have, and a little noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    distinct = []
    for _ in range(DISTINCT):
        height, width = random.integers(256, 401), random.integers(320, 481)
        picture = np.full((height, width, 3), 127.0)
        for cells in (3, 8, 24, 64):
            coarse = random.normal(0, 160 / cells**0.5, (cells, cells, 3))
            plane = np.clip(coarse + 127, 0, 255).astype(np.uint8)
            picture += np.asarray(Image.fromarray(plane).resize((width, height), Image.BICUBIC)) - 127.0
        picture += random.normal(0, random.uniform(1, 7), (height, width, 3))
        out = io.BytesIO()
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
        distinct.append(out.getvalue())
    for i in range(PICTURES):
        yield {"image": distinct[i % DISTINCT], "label": i % 10}


def raws():
    import numpy as np

    random = np.random.default_rng(1)
    for i in range(RAW_SAMPLES):
        yield {"image": random.bytes(RAW_BYTES), "label": i % 10}


def rows():
    import numpy as np

    table = np.random.default_rng(2).standard_normal((ROWS, FEATURES), dtype=np.float32)
    for i in range(ROWS):
        yield {"x": table[i], "y": i % 10}


SAMPLES = {"jpeg": pictures, "raw": raws, "rows": rows}


def make(case, folder):
    folder = Path(folder)
    writers = {"jpeg": (to_folder, to_parquet, to_tfrecord, to_mds, to_tar, to_litdata),
               "raw": (to_parquet, to_tfrecord, to_mds, to_tar, to_litdata),
               "rows": (to_parquet, to_tfrecord, to_mds, to_tar, to_litdata)}[case]
    for write in writers:
        out = folder / case / write.__name__.removeprefix("to_")
        if out.exists():
            continue
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # A process each, because TensorFlow and PyTorch do not load into one.
        subprocess.run([sys.executable, __file__, "write", write.__name__, case, str(partial)], check=True)
        partial.rename(out)


def write(writer, case, out):
    globals()[writer](case, Path(out))


def to_folder(case, out):
    for i, sample in enumerate(SAMPLES[case]()):
        path = out / str(sample["label"])
        path.mkdir(exist_ok=True)
        (path / f"{i:06}.jpg").write_bytes(sample["image"])


def to_parquet(case, out):
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = list(SAMPLES[case]())
    if case == "rows":
        columns = {"x": pa.array([s["x"] for s in samples], pa.list_(pa.float32(), FEATURES)),
                   "y": pa.array([s["y"] for s in samples], pa.int64())}
        group = 16_384
    else:
        columns = {"image": pa.array([s["image"] for s in samples], pa.binary()),
                   "label": pa.array([s["label"] for s in samples], pa.int64())}
        group = 1_000
    pq.write_table(pa.table(columns), out / "data.parquet", row_group_size=group, compression="none", use_dictionary=False)


def to_tfrecord(case, out):
    import tensorflow as tf

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=value))

    writer, size, shard = None, SHARD_BYTES, 0
    for sample in SAMPLES[case]():
        if size >= SHARD_BYTES:
            writer, size, shard = tf.io.TFRecordWriter(str(out / f"{shard:05}.tfrecord")), 0, shard + 1
        example = tf.train.Example(features=tf.train.Features(feature={k: feature(v) for k, v in sample.items()}))
        record = example.SerializeToString()
        size += len(record)
        writer.write(record)
    writer.close()


def to_mds(case, out):
    from streaming import MDSWriter

    columns = {"x": f"ndarray:float32:{FEATURES}", "y": "int"} if case == "rows" else {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_BYTES, hashes=["xxh64"]) as writer:
        for sample in SAMPLES[case]():
            writer.write(sample)


def to_tar(case, out):
    import webdataset

    # Its workers take a shard each at least.
    count = ROWS // 8 if case == "rows" else 1 << 30
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxsize=SHARD_BYTES, maxcount=count, verbose=0) as writer:
        for i, sample in enumerate(SAMPLES[case]()):
            if case == "rows":
                writer.write({"__key__": f"{i:06}", "x.bin": sample["x"].tobytes(), "y.cls": sample["y"]})
            else:
                writer.write({"__key__": f"{i:06}", "image.bin": sample["image"], "label.cls": sample["label"]})


def to_litdata(case, out):
    from litdata.streaming.writer import BinaryWriter
    from litdata.streaming import Cache

    cache = Cache(str(out), chunk_bytes=SHARD_BYTES)
    for i, sample in enumerate(SAMPLES[case]()):
        cache[i] = sample
    cache.done()
    cache.merge()


# Other loaders. Each is an iterator over batches: a pair of arrays, samples along the first dimension.


def to_tensors(case):
    """What a PyTorch loader does to a sample that was read: its values as the tensors of a batch."""
    import torch

    if case == "jpeg":
        from PIL import Image
        from torchvision.transforms import v2

        steps = v2.Compose([
            v2.Resize((SIDE, SIDE), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        return lambda image, label: (steps(Image.open(io.BytesIO(image)).convert("RGB")), int(label))
    if case == "raw":
        return lambda image, label: (torch.frombuffer(bytearray(image), dtype=torch.uint8), int(label))
    return lambda x, y: (torch.frombuffer(bytearray(x), dtype=torch.float32) if isinstance(x, bytes) else torch.as_tensor(x), int(y))


NAMES = {"jpeg": ("image", "label"), "raw": ("image", "label"), "rows": ("x", "y")}


def sample_to_tensors(case):
    convert, (first, second) = to_tensors(case), NAMES[case]
    return lambda sample: convert(sample[first], sample[second])


def torch_loader(dataset, case, **options):
    import torch

    torch.set_num_threads(1)
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH[case], num_workers=WORKERS, **options)


class Files:
    """Pictures of a folder."""

    def __init__(self, folder, case):
        self.files = sorted(Path(folder).glob("*/*.jpg"))
        self.convert = to_tensors(case)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.convert(self.files[i].read_bytes(), self.files[i].parent.name)


def pytorch(case, folder):
    if case == "jpeg":
        return torch_loader(Files(folder / "folder", case), case, shuffle=True)
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    # Already in memory, as PyTorch has no format of its own; reading it is start-up.
    table = pq.read_table(folder / "parquet/data.parquet")
    first, second = NAMES[case]
    if case == "rows":
        values = np.asarray(table[first].combine_chunks().flatten()).reshape(-1, FEATURES)
    else:
        values = np.stack([np.frombuffer(v.as_py(), np.uint8) for v in table[first]])
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(values), torch.from_numpy(np.array(table[second])))
    return torch_loader(dataset, case, shuffle=True)


def tfdata(case, folder):
    import tensorflow as tf

    first, second = NAMES[case]
    kind = tf.io.FixedLenFeature([FEATURES], tf.float32) if case == "rows" else tf.io.FixedLenFeature([], tf.string)
    features = {first: kind, second: tf.io.FixedLenFeature([], tf.int64)}
    options = tf.data.Options()
    options.threading.private_threadpool_size = WORKERS
    options.deterministic = False
    files = tf.data.Dataset.list_files(str(folder / "tfrecord/*.tfrecord"), shuffle=True)
    data = files.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=WORKERS)
    data = data.shuffle(16 * BATCH[case]).repeat()
    if case == "rows":
        data = data.batch(BATCH[case]).map(lambda r: tuple(tf.io.parse_example(r, features).values()), WORKERS)
    else:

        def one(record):
            parsed = tf.io.parse_single_example(record, features)
            if case == "raw":
                return tf.io.decode_raw(parsed[first], tf.uint8, fixed_length=None), parsed[second]
            picture = tf.image.resize(tf.io.decode_jpeg(parsed[first], channels=3), (SIDE, SIDE))
            return tf.transpose((picture / 255.0 - MEAN) / STD, (2, 0, 1)), parsed[second]

        data = data.map(one, WORKERS).batch(BATCH[case])
    return data.prefetch(2).with_options(options)


def mosaic(case, folder):
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    convert = sample_to_tensors(case)

    class Dataset(StreamingDataset):
        def __getitem__(self, i):
            return convert(super().__getitem__(i))

    return torch_loader(Dataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH[case]), case)


def webdataset(case, folder):
    import webdataset as wds

    shards = sorted(str(p) for p in (folder / "tar").glob("*.tar"))
    convert, (first, second) = to_tensors(case), NAMES[case]
    data = wds.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None, workersplitter=wds.split_by_worker)
    data = data.shuffle(16 * BATCH[case]).to_tuple(f"{first}.bin", f"{second}.cls").map_tuple(bytes, int)
    return torch_loader(data.map(lambda sample: convert(*sample)).repeat(), case)


def litdata(case, folder):
    import litdata as ld

    convert = sample_to_tensors(case)

    class Dataset(ld.StreamingDataset):
        def __getitem__(self, i):
            return convert(super().__getitem__(i))

    data = Dataset(str(folder / "litdata"), shuffle=True)
    return ld.StreamingDataLoader(data, batch_size=BATCH[case], num_workers=WORKERS, shuffle=True)


def huggingface(case, folder):
    import datasets

    data = datasets.Dataset.from_parquet(str(folder / "parquet/data.parquet"), cache_dir=str(folder / "huggingface"))
    first, second = NAMES[case]
    convert = to_tensors(case)
    data = data.with_transform(lambda b: {"pair": [convert(x, y) for x, y in zip(b[first], b[second])]})

    def collate(samples):
        import torch

        return torch.utils.data.default_collate([s["pair"] for s in samples])

    return torch_loader(data, case, shuffle=True, collate_fn=collate)


LOADERS = {"pytorch": pytorch, "tf.data": tfdata, "mosaic": mosaic, "webdataset": webdataset, "litdata": litdata,
           "huggingface": huggingface}


def load(loader, case, folder, samples):
    taken, samples, first = 0, int(samples), None
    batches = LOADERS[loader](case, Path(folder) / case)
    while taken < samples:
        before = taken
        for values, labels in batches:
            if first is None:
                first = time.time()
            taken += len(labels)
            if taken >= samples:
                break
        if taken == before:
            sys.exit(f"{loader} gave no samples")
    expected = {"jpeg": (3, SIDE, SIDE), "raw": (RAW_BYTES,), "rows": (FEATURES,)}[case]
    if tuple(values.shape[1:]) != expected:
        sys.exit(f"{loader} gave samples of shape {tuple(values.shape[1:])}, expected {expected}")
    print(first, taken)


if __name__ == "__main__":
    {"make": make, "write": write, "load": load}[sys.argv[1]](*sys.argv[2:])
