"""Sessions of onnxruntime with a library built with a sanitizer: see `make sanitize`.

python tests/native/sanitize_onnxruntime.py libinvolution_onnxruntime.so
"""

import ctypes
import pathlib
import sys

LIBRARY = pathlib.Path(sys.argv[1]).resolve()
# First: the linker gives the operators the first core that the process loads.
ctypes.CDLL(str(LIBRARY.with_name(LIBRARY.name.replace("_onnxruntime", ""))))
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def main():
    import numpy as np

    import involution.onnx
    from tests.native import test_onnxruntime as tests

    involution.onnx.library_path = lambda: LIBRARY
    for call in tests.CALLS:
        tests.test_operators_equal_the_oracle(call)
    arrays, proto = tests.photograph()
    expected = tests.run(proto, arrays, 1)
    for threads in 1, 2, 4:
        assert np.array_equal(tests.run(proto, arrays, threads), expected)
    tests.test_a_run_refuses_wrong_shapes()
    refused = tests.test_a_session_refuses_wrong_nodes
    (cases,) = [mark for mark in refused.pytestmark if mark.name == "parametrize"]
    for case in cases.args[1]:
        refused(*case)
    tests.test_ten_sessions_at_once()
    print(f"{len(tests.CALLS)} calls and {len(cases.args[1])} refusals: no report")


if __name__ == "__main__":
    main()
