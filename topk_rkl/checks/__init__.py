"""Every refusal and its message: the argument, the value seen, and what to do. Nothing here reads a device value."""

from topk_rkl.checks.around import *
from topk_rkl.checks.losses import *
from topk_rkl.checks.values import *
