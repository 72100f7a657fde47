# A CMake toolchain for the platform ZIG_TARGET of the environment. ZIG is the compiler of the wheel
# `ziglang`: Clang with its own C++ library, which is linked statically, and for each system the C
# library's headers and symbols. `make wheels` uses it.
set(target $ENV{ZIG_TARGET})
if(target MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
  # CMake asks for a compiler of resources; there are none.
  set(CMAKE_RC_COMPILER $ENV{ZIG})
elseif(target MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
  # CMake asks for it; libraries are linked with the paths that they are installed with.
  set(CMAKE_INSTALL_NAME_TOOL $ENV{ZIG})
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${target}")
# Zig adds checks that trap, and debug information, unless it is asked not to.
set(CMAKE_CXX_COMPILER $ENV{ZIG} c++ -target ${target} -fno-sanitize=all -g0)
