#!/bin/sh
# trim.sh VENV DEVICE: remove from the packages of VENV what no command of the image uses, before it is copied.
set -eu
packages=$(echo "$1"/lib/python3.*/site-packages) device=$2
cd "$packages"
# PyTorch's own tests, its C++ headers (extensions are built elsewhere) and protoc; torch_shm_manager is used.
rm -rf torch/test torch/include
find torch/bin -mindepth 1 -not -name torch_shm_manager -delete
# Ray's Java and its library of reinforcement learning; Arrow's servers; what boto3 would read for AWS beside S3.
rm -rf ray/jars ray/rllib pyarrow/include
rm -f pyarrow/libarrow_flight.* pyarrow/_flight.* pyarrow/libarrow_substrait.* pyarrow/_substrait.*
find botocore/data -mindepth 1 -maxdepth 1 -type d -not -name s3 -not -name 'sso*' -not -name sts -exec rm -rf {} +
# Tests of packages, which only their own test runs import. Those named `testing` are imported by users.
find . -mindepth 2 -type d -name tests -prune -exec rm -rf {} +
# Sources of compiled modules, and maps for debuggers of pages. Triton compiles its own at run time.
find . -type f \( -name '*.c' -o -name '*.pyx' -o -name '*.map' \) -not -path './triton/*' -delete
# Symbols that only a debugger reads. Libraries in `*.libs` were moved in their files by auditwheel: strip breaks such.
if [ "$device" = cpu ]; then
    find . -type f \( -name '*.so' -o -name '*.so.[0-9]*' -o -name gcs_server -o -name raylet \) \
        -size +256k -not -path '*.libs/*' -exec strip --strip-unneeded {} +
fi
