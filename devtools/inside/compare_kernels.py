"""Compares the kernels that run here on plain tensors and prints the table (run through with_package.py)."""

from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.values.request import AttentionRequest
from attention_backends.comparison.bench import TIMED, Case, run_cases
from attention_backends.comparison.bench_inputs import device_of


def compare_kernels() -> str:
    """A table of backends on a small problem, for people who have no ComfyUI yet: those that start at once here."""
    router = Router(detect())
    request = AttentionRequest(batch=1, num_heads=8, q_len=1024, kv_len=1024, head_dim=64, dtype="float32")
    case = Case("", request)
    backends = [
        name
        for name, backend in router.backends.items()
        if not backend.hosted and not backend.avoid_reasons(request, router.platform)
    ]
    ended = run_cases([case], backends, router, device_of(router.platform))
    lines = [f"call: {request.describe()}", f"{'backend':18} {'ms':>9} {'relative L2':>12}"]
    ran = [row for row in case.rows if row.status == "ok"]
    lines += [f"{row.backend:18} {row.ms:9.2f} {row.relative_l2:12.1e}" for row in ran]
    lines.append(
        f"median of {TIMED} calls; relative L2 against float64 on {case.checked_rows} query rows; "
        f"{len(router.backends) - len(ran)} more backends cannot run here or are not made for such a call"
    )
    return "\n".join([*lines, ended] if ended else lines)


if __name__ == "__main__":
    print(compare_kernels())
