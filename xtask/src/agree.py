"""Random inputs for a model, ONNX Runtime's answers to them, and the distance of another runtime's answers.

    agree.py prepare MODEL.onnx INPUTS.npz EXPECTED.npz
    agree.py answer MODEL.onnx INPUTS.npz EXPECTED.npz    prints how far its answers are apart with and without rewrites
    agree.py compare EXPECTED.npz ACTUAL.npz
"""
import sys

import numpy as np
import onnxruntime

# Sizes of dimensions that a model leaves open.
OPEN = {"N": 3, "T": 16}


def prepare(model, inputs, expected):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feed = {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) else OPEN.get(d, 2) for d in value.shape]
        if value.type == "tensor(float)":
            feed[value.name] = random.standard_normal(shape, dtype=np.float32)
        elif value.name == "attention_mask":
            feed[value.name] = (np.arange(shape[1]) < np.array([[16], [9], [1]])[: shape[0]]).astype(np.int64)
        elif value.type == "tensor(int64)":
            # Below two, so that it is valid for every table of the zoo.
            feed[value.name] = random.integers(0, 2, shape)
        else:
            sys.exit(f"{value.name}: no rule for inputs of {value.type}")
    names = [value.name for value in session.get_outputs()]
    np.savez(inputs, **feed)
    np.savez(expected, **dict(zip(names, session.run(names, feed))))


def answer(model, inputs, expected):
    answers = []
    # What the file says, node by node, and what the runtime makes of it: some of its rewrites round elsewhere.
    for level in ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        answers.append(session.run(names, dict(np.load(inputs))))
    np.savez(expected, **dict(zip(names, answers[0])))
    print(max(float(np.abs(a - b).max()) for a, b in zip(*answers)))


def compare(expected, actual):
    expected, actual = np.load(expected), np.load(actual)
    if sorted(expected.files) != sorted(actual.files):
        sys.exit(f"outputs {sorted(actual.files)}, expected {sorted(expected.files)}")
    difference, scale, same, answers = 0.0, 0.0, 0, 0
    for name in expected.files:
        if expected[name].shape != actual[name].shape:
            sys.exit(f"{name}: shape {actual[name].shape}, expected {expected[name].shape}")
        if not np.isfinite(actual[name]).all():
            sys.exit(f"{name}: not finite")
        difference = max(difference, float(np.abs(expected[name] - actual[name]).max()))
        scale = max(scale, float(np.abs(expected[name]).max()))
        same += int((expected[name].argmax(-1) == actual[name].argmax(-1)).sum())
        answers += expected[name].argmax(-1).size
    print(difference, scale, same / answers)


if __name__ == "__main__":
    {"prepare": prepare, "answer": answer, "compare": compare}[sys.argv[1]](*sys.argv[2:])
