"""The originals' side of the comparison of data formats: writes datasets, or reads them, and lists their cells.

Usage: interop.py write FOLDER | interop.py read FOLDER

A dataset is a folder; beside it lies NAME.cells, with one line for each cell: row, column, type and content in
hexadecimal, rows in order and columns by name. Both sides make this list, and the lists must be equal.
"""

import functools
import importlib.util
import json
import os
import sys
import types

import numpy as np

ROWS = 57
NAMES = {"bool": "bool", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8", "uint16": "u16",
         "uint32": "u32", "uint64": "u64", "float16": "f16", "float32": "f32", "float64": "f64"}


@functools.cache
def streaming():
    """MosaicML Streaming's formats. Its package also loads PyTorch and cloud clients, of which reading and writing shards
    uses nothing, so those are absent here."""

    class Absent(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    absent = [n for n in ["torch", "torch.distributed", "torch.utils", "torch.utils.data"] if n not in sys.modules]
    sys.modules.update({name: Absent(name) for name in absent})
    root = os.path.dirname(importlib.util.find_spec("streaming").origin)
    for name, path in [("streaming", root), ("streaming.base", os.path.join(root, "base"))]:
        module = types.ModuleType(name)
        module.__path__ = [path]
        sys.modules[name] = module
    from streaming.base.compression import decompress
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.format.mds.writer import MDSWriter
    from streaming.base.hashing import get_hash

    # WebDataset looks for PyTorch too, and must not find this.
    for name in absent:
        del sys.modules[name]
    return MDSReader, MDSWriter, decompress, get_hash


def cell(value):
    if isinstance(value, bytes):
        return "bytes", value
    if isinstance(value, str):
        return "text", value.encode()
    if isinstance(value, bool):
        value = np.array(value)
    elif isinstance(value, int):
        value = np.array(value, np.int64)
    elif isinstance(value, float):
        value = np.array(value, np.float64)
    value = np.ascontiguousarray(value).reshape(np.shape(value))
    return NAMES[value.dtype.name] + str(list(value.shape)), value.tobytes()


def list_cells(folder, name, rows):
    with open(os.path.join(folder, name + ".cells"), "w") as out:
        for number, row in enumerate(rows):
            for column in sorted(row):
                kind, content = cell(row[column])
                out.write(f"{number} {column} {kind} {content.hex()}\n")


def random_rows(seed):
    random = np.random.default_rng(seed)
    rows = []
    for number in range(ROWS):
        rows.append({
            "blob": random.bytes(int(random.integers(0, 400))),
            "text": "".join(chr(int(c)) for c in random.integers(0x20, 0x24f, int(random.integers(0, 30)))),
            "number": int(random.integers(-(2**62), 2**62)),
            "real": float(random.standard_normal()),
            "small": np.int16(random.integers(-(2**15), 2**15)),
            "vector": random.standard_normal(5).astype(np.float32),
            "matrix": random.integers(0, 256, (2, 3)).astype(np.uint8),
            "list": random.integers(-9, 9, int(random.integers(1, 300))).astype(np.int32),
        })
    return rows


def write_mds(folder):
    _, MDSWriter, _, _ = streaming()
    encodings = {"blob": "bytes", "text": "str", "number": "int", "real": "float64", "small": "int16",
                 "vector": "ndarray:float32:5", "matrix": "ndarray:uint8:2,3", "list": "ndarray:int32"}
    cases = [("mds", None, []), ("mds_zstd", "zstd:7", ["sha256", "xxh3_64"]), ("mds_gz", "gz", ["md5"])]
    for seed, (name, compression, hashes) in enumerate(cases):
        rows = random_rows(seed)
        extra = {"dynamic": "ndarray", "json": "json", "digits": "str_int", "decimal": "str_float"}
        for row in rows:
            row["dynamic"] = row["matrix"].astype(np.float64) / 7
            row["json"] = {"a": [1, None, row["text"]]}
            row["digits"] = row["number"]
            row["decimal"] = row["real"]
        with MDSWriter(out=os.path.join(folder, name), columns=encodings | extra, compression=compression, hashes=hashes,
                       size_limit=9000) as out:
            for row in rows:
                out.write(row)
        for row in rows:
            row["json"] = json.dumps(row["json"])
        list_cells(folder, name, rows)


def read_mds(folder, name):
    MDSReader, _, decompress, get_hash = streaming()
    path = os.path.join(folder, name)
    with open(os.path.join(path, "index.json")) as text:
        index = json.load(text)
    rows = []
    for shard in index["shards"]:
        stored = shard["zip_data"] or shard["raw_data"]
        with open(os.path.join(path, stored["basename"]), "rb") as file:
            data = file.read()
        assert len(data) == stored["bytes"]
        for algorithm, value in stored["hashes"].items():
            assert get_hash(algorithm, data) == value, (stored["basename"], algorithm)
        if shard["zip_data"]:
            data = decompress(shard["compression"], data)
            assert len(data) == shard["raw_data"]["bytes"]
            with open(os.path.join(path, shard["raw_data"]["basename"]), "wb") as file:
                file.write(data)
        reader = MDSReader.from_json(path, "", shard)
        reader.validate(False)
        for number in range(shard["samples"]):
            rows.append(reader.decode_sample(reader.get_sample_data(number)))
    return rows


def write_tar(folder):
    import webdataset

    for seed, (name, end) in enumerate([("tar", "tar"), ("tar_gz", "tar.gz")]):
        rows = random_rows(10 + seed)
        os.makedirs(os.path.join(folder, name))
        cells = []
        with webdataset.ShardWriter(os.path.join(folder, name, f"part-%03d.{end}"), maxcount=20, verbose=0) as out:
            for number, row in enumerate(rows):
                # Some names need a pax header.
                key = f"{'long/' * (30 * (number % 7 == 3))}row{number:05d}"
                sample = {"__key__": key, "bin": row["blob"], "txt": row["text"], "cls": row["number"],
                          "vector.npy": row["vector"], "json": {"a": row["number"]}}
                out.write(sample)
                cells.append(sample | {"json": json.dumps(sample["json"])})
        list_cells(folder, name, cells)


def read_tar(folder, name):
    import webdataset

    path = os.path.join(folder, name)
    shards = sorted(os.path.join(path, shard) for shard in os.listdir(path) if shard.endswith(".tar"))
    rows = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode():
        rows.append({column: value for column, value in sample.items()
                     if column == "__key__" or not column.startswith("__")})
    return rows


def features(row, tf):
    def feature(value):
        if isinstance(value, (bytes, str)):
            value = value.encode() if isinstance(value, str) else value
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        value = np.atleast_1d(value)
        if value.dtype.kind == "f":
            return tf.train.Feature(float_list=tf.train.FloatList(value=value.ravel()))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=value.ravel()))

    return tf.train.Example(features=tf.train.Features(feature={c: feature(v) for c, v in row.items()}))


def write_tfrecord(folder):
    import tensorflow as tf

    cases = [("tfrecord", "part-{}.tfrecord", None), ("tfrecord_gz", "part-{}.tfrecord.gz", "GZIP"),
             ("tfrecord_numbered", "train.tfrecord-{:05}-of-00003", None)]
    for seed, (name, file, options) in enumerate(cases):
        rows = random_rows(20 + seed)
        os.makedirs(os.path.join(folder, name))
        for shard in range(3):
            with tf.io.TFRecordWriter(os.path.join(folder, name, file.format(shard)), options) as out:
                for row in rows[shard * 19:shard * 19 + 19]:
                    row["real"] = np.float32(row["real"])
                    out.write(features(row, tf).SerializeToString())
        for row in rows:
            row["text"] = row["text"].encode()
            for column in ["small", "matrix", "list"]:
                row[column] = np.asarray(row[column], np.int64).reshape(np.shape(row[column]) and -1 or ())
        list_cells(folder, name, rows)


def read_tfrecord(folder, name):
    import tensorflow as tf

    path = os.path.join(folder, name)
    shards = sorted(os.path.join(path, shard) for shard in os.listdir(path) if shard.endswith(".tfrecord"))
    rows = []
    for record in tf.data.TFRecordDataset(shards):
        row = {}
        for column, feature in tf.train.Example.FromString(record.numpy()).features.feature.items():
            kind = feature.WhichOneof("kind")
            values = getattr(feature, kind).value
            if kind == "bytes_list":
                (row[column],) = values
            else:
                row[column] = np.array(values, {"float_list": np.float32, "int64_list": np.int64}[kind])
        rows.append(row)
    return rows


def table(rows, pa):
    arrays = {
        "blob": pa.array([row["blob"] for row in rows], pa.binary()),
        "text": pa.array([row["text"] for row in rows], pa.string()),
        "number": pa.array([row["number"] for row in rows], pa.int64()),
        "real": pa.array([row["real"] for row in rows], pa.float64()),
        "small": pa.array([row["small"] for row in rows], pa.int16()),
        "vector": pa.array([row["vector"] for row in rows], pa.list_(pa.float32(), 5)),
        "list": pa.array([row["list"] for row in rows], pa.list_(pa.int32())),
        "flag": pa.array([row["number"] % 2 == 0 for row in rows], pa.bool_()),
        "half": pa.array([np.float16(row["real"]) for row in rows], pa.float16()),
    }
    for row in rows:
        del row["matrix"]
        row["flag"] = row["number"] % 2 == 0
        row["half"] = np.float16(row["real"])
    return pa.table(arrays)


def nested(rows, pa):
    """A table with the structs of Hugging Face's pictures, structs in structs, and lists of booleans; text and bytes as
    views, as Polars writes them."""
    columns = table(rows, pa)
    image = [{"bytes": row["blob"], "path": row["text"]} for row in rows]
    deep = [{"a": {"number": row["number"], "list": row["list"]}} for row in rows]
    flags = [[bool(value % 2) for value in row["list"]] for row in rows]
    for row, bools in zip(rows, flags):
        row |= {"image.bytes": row["blob"], "image.path": row["text"], "deep.a.number": row["number"],
                "deep.a.list": row["list"], "flags": np.array(bools)}
    struct = pa.struct([("number", pa.int64()), ("list", pa.list_(pa.int32()))])
    columns = columns.append_column("image", pa.array(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    columns = columns.append_column("deep", pa.array(deep, pa.struct([("a", struct)])))
    columns = columns.append_column("flags", pa.array(flags, pa.list_(pa.bool_())))
    for name, view in (("text", pa.string_view()), ("blob", pa.binary_view())):
        place = columns.schema.get_field_index(name)
        columns = columns.set_column(place, name, columns[name].cast(view))
    return columns


def write_arrow(folder):
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    cases = ["parquet_snappy", "parquet_zstd", "arrow_file", "arrow_stream", "feather_lz4", "jsonl", "csv", "parquet_lz4",
             "parquet_delta", "arrow_nested", "csv_gz", "tsv", "jsonl_zst"]
    for seed, name in enumerate(cases):
        rows = random_rows(30 + seed)
        os.makedirs(os.path.join(folder, name))
        is_table = name.startswith(("csv", "tsv"))
        if is_table or name.startswith("jsonl"):
            for row in rows:
                for column in ["blob", "matrix", "small"] + (["vector", "list"] if is_table else []):
                    del row[column]
                for column in ["vector", "list"]:
                    if column in row:
                        row[column] = np.asarray(row[column], np.int64 if column == "list" else np.float64)
                # Blanks around a cell of CSV are no part of it, and no cell may be empty.
                row["text"] = "x" + row["text"].strip() + "x"
        elif name.endswith(("_lz4", "_delta", "_nested")) and name != "feather_lz4":
            columns = nested(rows, pa)
        else:
            columns = table(rows, pa)
        for shard in range(2):
            part = rows[shard * 30:shard * 30 + 30]
            path = os.path.join(folder, name, f"part-{shard}")
            if name.startswith("parquet"):
                page = "1.0" if name == "parquet_snappy" else "2.0"
                options = {"compression": "none" if name == "parquet_delta" else name.split("_")[1]}
                if name == "parquet_delta":
                    encodings = {"number": "DELTA_BINARY_PACKED", "small": "DELTA_BINARY_PACKED", "text": "DELTA_BYTE_ARRAY",
                                 "blob": "DELTA_LENGTH_BYTE_ARRAY", "real": "BYTE_STREAM_SPLIT", "flag": "RLE"}
                    options |= {"use_dictionary": False, "column_encoding": encodings}
                pa.parquet.write_table(columns.slice(shard * 30, 30), path + ".parquet", row_group_size=13,
                                       data_page_version=page, **options)
            elif name == "arrow_file":
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                with pa.ipc.new_file(path + ".arrow", columns.schema, options=options) as out:
                    out.write_table(columns.slice(shard * 30, 30), max_chunksize=11)
            elif name in ("arrow_stream", "arrow_nested"):
                with pa.ipc.new_stream(path + ".arrow", columns.schema) as out:
                    out.write_table(columns.slice(shard * 30, 30), max_chunksize=11)
            elif name == "feather_lz4":
                pa.feather.write_feather(columns.slice(shard * 30, 30), path + ".feather", chunksize=11)
            elif is_table:
                import pyarrow.csv

                part = pa.table({c: [row[c] for row in part] for c in ["text", "number", "real"]})
                options = pa.csv.WriteOptions(delimiter="\t" if name == "tsv" else ",")
                with pa.output_stream(path + "." + name.replace("_", "."), compression="detect") as out:
                    pa.csv.write_csv(part, out, options)
            else:
                with pa.output_stream(path + "." + name.replace("_", "."), compression="detect") as out:
                    for row in part:
                        line = {c: v.tolist() if hasattr(v, "tolist") else v for c, v in row.items()}
                        out.write(json.dumps(line).encode() + b"\n")
        list_cells(folder, name, rows)


def read_parquet(folder, name):
    import pyarrow.parquet as parquet

    path = os.path.join(folder, name)
    rows = []
    for shard in sorted(os.listdir(path)):
        if not shard.endswith(".parquet"):
            continue
        file = parquet.ParquetFile(os.path.join(path, shard))
        group = file.metadata.row_group(0)
        for column in range(group.num_columns):
            assert group.column(column).has_column_index and group.column(column).has_offset_index
            assert group.column(column).statistics is not None
        table = file.read()
        first = len(rows)
        rows.extend({} for _ in range(table.num_rows))
        for field, column in zip(table.schema, table.columns):
            for number, value in enumerate(column):
                value = value.as_py()
                if hasattr(field.type, "value_type"):
                    value = np.array(value, field.type.value_type.to_pandas_dtype())
                elif not isinstance(value, (bytes, str)):
                    value = np.array(value, field.type.to_pandas_dtype())
                rows[first + number][field.name] = value
    return rows


READERS = {"mds": read_mds, "mds_zstd": read_mds, "tar": read_tar, "tfrecord": read_tfrecord, "parquet": read_parquet,
           "parquet_zstd": read_parquet}


def main():
    what, folder = sys.argv[1:]
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    if what == "write":
        for write in [write_mds, write_tar, write_tfrecord, write_arrow]:
            write(folder)
    else:
        for name, read in READERS.items():
            list_cells(folder, name + ".theirs", read(folder, name))


main()
