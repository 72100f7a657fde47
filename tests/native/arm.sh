# The core for Arm, built by GCC and Clang and run under user-mode emulation: its test program, and calls
# from Python compared with the oracle. Requires Debian or a derivative; run by `make test-arm`. All
# builds and downloads are in build/arm.
#
#     sh tests/native/arm.sh LIBRARY
#
# tests an existing library instead.
set -eu
library=${1:-}
python=${PYTHON:-python3}
missing=
for tool in cmake:cmake aarch64-linux-gnu-g++:g++-aarch64-linux-gnu clang++:clang qemu-aarch64:qemu-user; do
	command -v "${tool%%:*}" > /dev/null || missing="$missing ${tool#*:}"
done
if [ -n "$missing" ]; then
	echo "make test-arm needs: apt-get install$missing" >&2
	exit 1
fi
here=$PWD/build/arm
root=$here/root
mkdir -p "$here/state/lists/partial" "$here/cache/archives/partial" "$here/packages"

# Python for Arm, from this system's package sources. apt has its own state, so that the system's does
# not change.
if [ ! -e "$here/ready" ]; then
	touch "$here/status"
	set -- -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$here/state" \
		-o Dir::State::status="$here/status" -o Dir::Cache="$here/cache" -o APT::Sandbox::User=
	apt-get "$@" update
	version=$(apt-cache "$@" show python3-minimal | sed -n 's/^Version: \(3\.[0-9]*\).*/\1/p' | head -n 1)
	(cd "$here/packages" && apt-get "$@" download libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 \
		"libpython$version-minimal" "python$version-minimal" "libpython$version-stdlib")
	for package in "$here"/packages/*.deb; do dpkg -x "$package" "$root"; done
	# Packages with a merged /usr.
	[ -e "$root/lib" ] || ln -s usr/lib "$root/lib"
	"$python" -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" \
		--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
		--platform manylinux2014_aarch64 -c constraints.txt -d "$here/packages" numpy
	for wheel in "$here"/packages/*.whl; do "$python" -m zipfile -e "$wheel" "$here/site"; done
	touch "$here/ready"
fi

run_python() {
	PYTHONHOME=$root/usr PYTHONPATH=$here/site:$PWD PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1 \
		qemu-aarch64 -L "$root" "$root"/usr/bin/python3.* -m tests.native.arm "$1"
}
if [ -n "$library" ]; then
	run_python "$library"
	exit
fi

for compiler in gcc clang; do
	build=$here/$compiler
	if [ $compiler = gcc ]; then
		set -- -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	else
		set -- -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu
	fi
	cmake -S csrc -B "$build" -DINVOLUTION_CALLS=ON -DCMAKE_CXX_FLAGS=-Werror \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "$@"
	cmake --build "$build" --parallel 2
	qemu-aarch64 -L "$root" "$build/calls" 10
	run_python "$build/libinvolution.so"
done
