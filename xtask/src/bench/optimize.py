"""ONNX Runtime's own ways to a smaller model, and its answers.

    optimize.py quantize METHOD MODEL.onnx SAMPLES.npz OUT.onnx    prints seconds and bytes of peak memory
    optimize.py answer MODEL.onnx INPUTS.npz OUT.npz               the first output for all samples
"""
import resource
import sys
import time

import compress
import numpy as np


def dynamic(model, samples, out):
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out + ".prepared.onnx"
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, out, per_channel=True)


def int4(model, samples, out):
    import onnx
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    # As ONNX operators, which other runtimes know too; its own operator is what it makes of them when it loads them.
    quantizer = MatMulNBitsQuantizer(
        onnx.load(model), bits=4, block_size=32, is_symmetric=False, quant_format=QuantFormat.QDQ
    )
    quantizer.process()
    quantizer.model.save_model_to_file(out)


def quantize(method, model, samples, out):
    if method in ("min-max", "entropy"):
        compress.quantize(model, samples, out, method, len(np.load(samples)[np.load(samples).files[0]]))
        return
    start = time.perf_counter()
    {"dynamic": dynamic, "int4": int4}[method](model, samples, out)
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def answer(model, inputs, out):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    loaded = np.load(inputs)
    arrays = {i.name: loaded[i.name] for i in session.get_inputs()}
    count = len(next(iter(arrays.values())))
    parts = [
        session.run(None, {name: array[at : at + 100] for name, array in arrays.items()})[0]
        for at in range(0, count, 100)
    ]
    np.savez(out, output=np.concatenate(parts))


if __name__ == "__main__":
    {"quantize": quantize, "answer": answer}[sys.argv[1]](*sys.argv[2:])
