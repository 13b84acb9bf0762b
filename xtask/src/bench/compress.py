"""ONNX models in other runtimes, and ONNX Runtime's quantizer.

    compress.py run RUNTIME MODEL.onnx INPUTS.npz THREADS    reads a number of runs a line, answers wall and CPU milliseconds
    compress.py quantize MODEL.onnx SAMPLES.npz OUT.onnx METHOD COUNT    prints seconds and bytes of peak memory
    compress.py inputs NETWORK SAMPLES OUT.npz    random inputs
"""
import resource
import sys
import time

import numpy as np

# Single precision where float is measured: the default is bfloat16 on processors that have it.
SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}


def onnx_runtime(model, feed, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)


def openvino(model, feed, threads):
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(model, "CPU", SETTINGS | {"INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    return lambda: request.infer(feed)


def run(runtime, model, inputs, threads):
    feed = dict(np.load(inputs))
    step = {"onnxruntime": onnx_runtime, "openvino": openvino}[runtime](model, feed, int(threads))
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3, flush=True)


def quantize(model, samples, out, method, count):
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    loaded = np.load(samples)
    arrays = {name: loaded[name] for name in loaded.files if name != "label"}

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.at = 0

        def get_next(self):
            if self.at == int(count):
                return None
            self.at += 1
            return {name: arrays[name][self.at - 1 : self.at] for name in arrays}

    start = time.perf_counter()
    prepared = out + ".prepared.onnx"
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    methods = {"min-max": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}
    quantize_static(
        prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, calibrate_method=methods[method]
    )
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def inputs(network, samples, out):
    random, n = np.random.default_rng(0), int(samples)
    if network == "bert":
        ids = random.integers(0, 30522, (n, 128))
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    else:
        arrays = {"image": random.standard_normal((n, 3, 224, 224), dtype=np.float32)}
    np.savez(out, **arrays, label=np.zeros(n, dtype=np.int64)) if n > 1 else np.savez(out, **arrays)


if __name__ == "__main__":
    {"run": run, "quantize": quantize, "inputs": inputs}[sys.argv[1]](*sys.argv[2:])
