"""Loss and gradients of an ONNX network by PyTorch, in double precision, and how far others are from them.

    gradients.py MODEL.onnx BATCH.onnx LABEL_SMOOTHING RESULT.onnx...

BATCH holds the inputs and `labels` as initializers; each RESULT holds `loss` and gradients by the parameters' names.
Prints a line for each RESULT: number of parameters, the loss's difference over the loss, the largest difference of a
gradient's element, the largest such difference over its parameter's largest gradient, and where that is.
"""
import sys

import numpy as np
import onnx
import torch
import torch.nn.functional as F

# Parameters whose gradients are below this share of the network's largest one are sums that cancel (to zero, for the
# bias before a batch normalisation); they are measured against that share instead of themselves, because in single
# precision nothing of them but rounding may be left.
NOISE = 1e-3


def batch_norm(x, scale, bias, mean, variance, *, epsilon=1e-5, momentum=0.9):
    # In training: the statistics of the batch.
    return F.batch_norm(x, None, None, scale, bias, training=True, eps=epsilon)


def conv(x, w, b=None, *, kernel_shape=None, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), group=1):
    top, left, bottom, right = pads
    return F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, tuple(strides), 0, tuple(dilations), group)


def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return y if c is None else y + beta * c


def max_pool(x, *, kernel_shape, strides=(1, 1), pads=(0, 0, 0, 0)):
    top, left, bottom, right = pads
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-torch.inf), tuple(kernel_shape), tuple(strides))


def layer_norm(x, scale, bias=None, *, axis=-1, epsilon=1e-5):
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def reshape(x, shape):
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())])


def slice_(x, starts, ends, axes=None, steps=None):
    axes = range(len(starts)) if axes is None else axes.tolist()
    steps = [1] * len(starts) if steps is None else steps.tolist()
    index = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts.tolist(), ends.tolist(), steps):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def split(x, sizes=None, *, axis=0, num_outputs=None):
    return torch.split(x, -(-x.shape[axis] // num_outputs) if sizes is None else sizes.tolist(), axis)


def unsqueeze(x, axes):
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def cast(x, *, to):
    return x.to(torch.float64 if to in (1, 11) else torch.int64)


OPERATORS = {
    "Add": torch.add,
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": lambda x, low, high: torch.clamp(x, low, high),
    "Concat": lambda *x, axis: torch.cat(x, axis),
    "Conv": conv,
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, shape.tolist())),
    "Flatten": lambda x, axis=1: x.reshape(int(np.prod(x.shape[:axis])), -1),
    "Gather": lambda x, i, axis=0: x.index_select(axis, i.reshape(-1)).reshape(
        *x.shape[:axis], *i.shape, *x.shape[axis:][1:]
    ),
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": gemm,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "LayerNormalization": layer_norm,
    "MatMul": torch.matmul,
    "MaxPool": max_pool,
    "Mul": torch.mul,
    "Relu": torch.relu,
    "Reshape": reshape,
    "Shape": lambda x, start=0, end=None: torch.tensor(x.shape[start:end]),
    "Slice": slice_,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Split": split,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": unsqueeze,
}


def tensor(proto):
    array = torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())
    return array.double() if array.is_floating_point() else array


def tensors(file):
    return {proto.name: tensor(proto) for proto in onnx.load(file).graph.initializer}


def attributes(node):
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def run(graph, values):
    for node in graph.node:
        if node.op_type == "Constant":
            outputs = tensor(attributes(node)["value"])
        elif node.op_type in OPERATORS:
            operands = [values[name] if name else None for name in node.input]
            outputs = OPERATORS[node.op_type](*operands, **attributes(node))
        else:
            sys.exit(f"{node.op_type} has no counterpart here")
        for name, value in zip(node.output, outputs if isinstance(outputs, tuple) else (outputs,)):
            values[name] = value
    return values[graph.output[0].name]


def main(model, batch, smoothing, *results):
    graph = onnx.load(model).graph
    values = tensors(batch)
    labels = values.pop("labels")
    parameters = {proto.name: tensor(proto) for proto in graph.initializer}
    for parameter in parameters.values():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    logits = run(graph, values | parameters)
    # The option is single precision over there.
    smoothing = float(np.float32(smoothing))
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing, ignore_index=-100)
    loss.backward()
    expected = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in expected.values())
    for file in results:
        found = tensors(file)
        if set(found) - {"loss"} != set(expected):
            sys.exit(f"{file}: gradients differ in {sorted(set(found) ^ set(expected))}")
        absolute, relative, farthest = 0.0, 0.0, "-"
        for name, gradient in expected.items():
            if found[name].shape != gradient.shape:
                sys.exit(f"{file}: {name} has shape {tuple(found[name].shape)}, expected {tuple(gradient.shape)}")
            if not torch.isfinite(found[name]).all():
                sys.exit(f"{file}: {name} is not finite")
            difference = float((found[name] - gradient).abs().max())
            share = difference / max(float(gradient.abs().max()), NOISE * largest)
            absolute = max(absolute, difference)
            if share > relative:
                relative, farthest = share, name
        drift = float((found["loss"] - loss).abs() / loss.abs())
        print(sum(g.numel() for g in expected.values()), drift, absolute, relative, farthest)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
