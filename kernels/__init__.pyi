from mstc.kernels.api import dplr_attention as dplr_attention
from mstc.kernels.api import linear_attention as linear_attention
from mstc.kernels.common.checks import KernelArgumentError as KernelArgumentError
from mstc.kernels.selective_scan.op import selective_scan as selective_scan
from mstc.kernels.sliding_window.merge import merge as merge
from mstc.kernels.sliding_window.op import sliding_window_attention as sliding_window_attention
