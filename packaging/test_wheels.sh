# Tests the wheels in dist/ that this machine can run, by `make test-wheels`: for x86-64 the package,
# installed without a compiler; for Arm the core under emulation; for Windows the core under Wine.
# Lists the wheels that are not tested. All output is in build/wheels.
set -eu
python=${PYTHON:-python3}
build=$PWD/build/wheels
rm -rf "$build"
mkdir -p "$build"

# No compiler on the path: the tested libraries must be the wheel's.
"$python" -m venv "$build/venv"
"$build/venv/bin/pip" install --quiet dist/involution-*-manylinux_2_28_x86_64.whl "jax>=0.7" -c constraints.txt
(cd "$build" && PATH=$build/venv/bin KERAS_BACKEND=jax PYTHONPATH=$OLDPWD \
	python "$OLDPWD/packaging/test_wheel.py")
PATH=$build/venv/bin KERAS_BACKEND=jax "$build/venv/bin/involution" doctor --all

"$python" -m zipfile -e dist/involution-*-manylinux_2_28_aarch64.whl "$build/arm"
sh tests/native/arm.sh "$build/arm/involution/native/libinvolution.so"

"$python" -m zipfile -e dist/involution-*-win_amd64.whl "$build/windows"
wine=$(command -v wine64 || command -v wine || echo /usr/lib/wine/wine64)
if [ -x "$wine" ]; then
	cp "$build"/windows/involution/native/*.dll "$build"
	"$ZIG" c++ -target x86_64-windows-gnu -std=c++17 -O1 -fno-sanitize=all -Icsrc \
		tests/native/sanitize.cpp "$build/libinvolution.dll" -o "$build/calls.exe"
	(cd "$build" && WINEDEBUG=-all WINEPREFIX=$build/wine "$wine" calls.exe 10)
else
	echo "Windows: built, not tested (apt-get install wine64)"
fi
echo "macOS: built, not tested"
