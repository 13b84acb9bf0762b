"""Writes the node cases of the installed onnx package into a folder.

A case is `NAME/model.onnx` and, for each of its data sets, `NAME/data_N.onnx`: a model without nodes whose graph outputs
are constants, first the inputs and then the expected outputs, so that one reader serves for both. `cases.tsv` lists
name, rtol, atol, number of data sets, number of inputs, and why a case cannot be written down as tensors, if so.

usage: conformance.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import numpy
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases


def as_tensor(value, name):
    if isinstance(value, TensorProto):
        tensor = TensorProto()
        tensor.CopyFrom(value)
    elif isinstance(value, (numpy.ndarray, numpy.generic, int, float, bool)):
        tensor = numpy_helper.from_array(numpy.asarray(value))
    else:
        raise TypeError("a value that is no tensor")
    tensor.name = name
    return tensor


def as_model(inputs, outputs):
    tensors = [as_tensor(v, f"input:{i}") for i, v in enumerate(inputs)]
    tensors += [as_tensor(v, f"output:{i}") for i, v in enumerate(outputs)]
    ends = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    graph = helper.make_graph([], "data", [], ends, initializer=tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    # Some cases overflow or divide by zero on purpose.
    warnings.simplefilter("ignore")
    rows = []
    for case in sorted(collect_testcases(None), key=lambda c: c.name):
        place = folder / case.name
        place.mkdir(exist_ok=True)
        (place / "model.onnx").write_bytes(case.model.SerializeToString())
        problem = ""
        inputs = []
        for number, (inputs, outputs) in enumerate(case.data_sets):
            try:
                data = as_model(inputs, outputs)
            except TypeError as error:
                problem = str(error)
                break
            (place / f"data_{number}.onnx").write_bytes(data.SerializeToString())
        rows.append((case.name, case.rtol, case.atol, len(case.data_sets), len(inputs), problem))
    text = "".join("\t".join(str(column) for column in row) + "\n" for row in rows)
    (folder / "cases.tsv").write_text(text)


main()
