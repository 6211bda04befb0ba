# Toolchain file: from this machine for Linux on 64-bit Arm, with Debian's cross compiler (g++-aarch64-linux-gnu).
#
#   cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=tests/native/aarch64.cmake -Dnanobind_DIR="$(python -m nanobind --cmake_dir)" \
#       -DPython_INCLUDE_DIR="$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
#
# Headers of Python are this machine's: both systems have 64-bit pointers and longs, so they describe the same interface.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)
