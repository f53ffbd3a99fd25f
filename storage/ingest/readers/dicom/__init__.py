"""DICOM: finding series, reading their files, and laying slices, frames, mosaics and segmentations on a grid."""
