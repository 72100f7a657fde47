# Runs what can be run here of the wheels in dist/, by `make test-wheels`: on x86-64 the whole package,
# installed where there is no compiler; for Arm under emulation and for Windows under Wine the core. What
# cannot be run is named. All that it makes lies in build/wheels.
set -eu
python=${PYTHON:-python3}
made=$PWD/build/wheels
rm -rf "$made"
mkdir -p "$made"

# No compiler is found, and no jaxlib but the one that JAX brings: what is tested is the wheel's.
"$python" -m venv "$made/venv"
"$made/venv/bin/pip" install --quiet dist/involution-*-manylinux_2_28_x86_64.whl "jax>=0.7" -c constraints.txt
(cd "$made" && PATH=$made/venv/bin KERAS_BACKEND=jax PYTHONPATH=$OLDPWD/tests \
	python "$OLDPWD/packaging/test_wheel.py")
PATH=$made/venv/bin KERAS_BACKEND=jax "$made/venv/bin/involution" doctor

"$python" -m zipfile -e dist/involution-*-manylinux_2_28_aarch64.whl "$made/arm"
sh tests/native/arm.sh "$made/arm/involution/native/libinvolution.so"

"$python" -m zipfile -e dist/involution-*-win_amd64.whl "$made/windows"
wine=$(command -v wine64 || command -v wine || echo /usr/lib/wine/wine64)
if [ -x "$wine" ]; then
	cp "$made"/windows/involution/native/*.dll "$made"
	"$ZIG" c++ -target x86_64-windows-gnu -std=c++17 -O1 -fno-sanitize=all -Icsrc \
		tests/native/sanitize.cpp "$made/libinvolution.dll" -o "$made/calls.exe"
	(cd "$made" && WINEDEBUG=-all WINEPREFIX=$made/wine "$wine" calls.exe 10)
else
	echo "Windows: built, not run (apt-get install wine64)"
fi
echo "macOS: built, not run"
