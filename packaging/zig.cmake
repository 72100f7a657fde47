# CMake toolchain of `make wheels` for the target in the environment variable ZIG_TARGET. ZIG is the
# compiler of the package `ziglang`: Clang with a statically linked C++ library, and with the headers
# and symbols of each system's C library.
set(target $ENV{ZIG_TARGET})
if(target MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
  # CMake requires a resource compiler; there are no resources.
  set(CMAKE_RC_COMPILER $ENV{ZIG})
elseif(target MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
  # Required by CMake but unused: libraries are linked with their installed paths.
  set(CMAKE_INSTALL_NAME_TOOL $ENV{ZIG})
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${target}")
# Disables Zig's default traps and debug information.
set(CMAKE_CXX_COMPILER $ENV{ZIG} c++ -target ${target} -fno-sanitize=all -g0)
