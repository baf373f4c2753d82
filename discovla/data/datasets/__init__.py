"""Annotation files of datasets, as they are found, turned into clips; a dataset a file."""

from discovla.data.datasets.activitynet import activitynet
from discovla.data.datasets.annotated import Annotated, first_captions, hold_out, with_frame_captions
from discovla.data.datasets.didemo import didemo
from discovla.data.datasets.generic import csv_clips, folder_clips, jsonl_clips
from discovla.data.datasets.lsmdc import lsmdc
from discovla.data.datasets.msrvtt import msrvtt
from discovla.data.datasets.msvd import msvd
from discovla.data.datasets.report import Report, prepare, report
from discovla.data.datasets.vatex import vatex

__all__ = [
    "Annotated",
    "Report",
    "activitynet",
    "csv_clips",
    "didemo",
    "first_captions",
    "folder_clips",
    "hold_out",
    "jsonl_clips",
    "lsmdc",
    "msrvtt",
    "msvd",
    "prepare",
    "report",
    "vatex",
    "with_frame_captions",
]
