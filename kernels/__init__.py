"""The Triton kernels behind `smaug.ops`, one file an op. This folder is installed as `smaug.kernels`.

Imports torch and triton only, and neither on import of this package: `smaug.ops` must load where Triton is missing.
"""

if __name__ == "kernels":  # found through the repository's root; another package of this name exists
    raise ImportError("this folder is installed as smaug.kernels: `pip install -e .`, then `import smaug.kernels`")


def triton_status() -> str:
    """Whether Triton kernels can run here: "ok", or one sentence that says why not.

    Triton's interpreter counts as ok: it runs the kernels on CPU tensors, slowly, for tests.
    """
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            return f"Triton is installed but does not import: {error}."
        return "Triton is not installed (`pip install triton`; Linux only)."
    except Exception as error:  # a broken driver library raises whatever it likes; the caller wants the sentence
        return f"Triton is installed but does not import: {error}."
    if triton.knobs.runtime.interpret:
        return "ok"

    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device."
    major, minor = torch.cuda.get_device_capability()
    if torch.version.cuda and major < 8:
        return f"Triton needs compute capability 8.0; {torch.cuda.get_device_name()} has {major}.{minor}."
    return "ok"
