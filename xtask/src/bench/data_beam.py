"""TFRecord to Parquet by Apache Beam's DirectRunner: `data_beam.py FILES OUT`, samples with a picture and a label."""
import sys

WORKERS = 2


def example_class():
    """The message `tf.train.Example`, without TensorFlow."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    optional, repeated = 1, 3
    message, entry_key = 11, 9

    def add(name, *fields):
        described = file.message_type.add(name=name)
        for field, number, label, kind, of in fields:
            described.field.add(name=field, number=number, label=label, type=kind, type_name=of)
        return described

    add("BytesList", ("value", 1, repeated, 12, None))
    add("FloatList", ("value", 1, repeated, 2, None))
    add("Int64List", ("value", 1, repeated, 3, None))
    add("Feature", *((f"{k}_list", i + 1, optional, message, f".tensorflow.{k.title()}List")
                     for i, k in enumerate(("bytes", "float", "int64"))))
    features = add("Features", ("feature", 1, repeated, message, ".tensorflow.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.field.add(name="key", number=1, label=optional, type=entry_key)
    entry.field.add(name="value", number=2, label=optional, type=message, type_name=".tensorflow.Feature")
    entry.options.map_entry = True
    add("Example", ("features", 1, optional, message, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


class ParseExample:
    """A picture and its label of a record; workers make their own class, as it cannot be sent to them."""

    parser = None

    def __call__(self, record):
        if ParseExample.parser is None:
            ParseExample.parser = example_class()
        feature = ParseExample.parser.FromString(record).features.feature
        return {"image": feature["image"].bytes_list.value[0], "label": feature["label"].int64_list.value[0]}


def convert(files, out):
    import apache_beam as beam
    import pyarrow
    from apache_beam.options.pipeline_options import PipelineOptions

    options = PipelineOptions(["--runner=DirectRunner", f"--direct_num_workers={WORKERS}",
                               "--direct_running_mode=multi_processing"])
    schema = pyarrow.schema([("image", pyarrow.binary()), ("label", pyarrow.int64())])
    with beam.Pipeline(options=options) as pipeline:
        _ = (pipeline
             | beam.io.ReadFromTFRecord(files)
             | beam.Map(ParseExample())
             | beam.io.WriteToParquet(f"{out}/part", schema, file_name_suffix=".parquet"))


if __name__ == "__main__":
    convert(*sys.argv[1:])
