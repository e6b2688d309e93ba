"""Pictures of where a student errs: its text coloured by the loss of each token, and both distributions on S.

from topk_rkl.plot import save_html, save_png, token_report

report = token_report(student_logits, support, input_ids, tokenizer, weights=response_mask)
save_html(report, "errors.html")  # one file, which needs no network
save_png(report, "errors.png")  # needs matplotlib: pip install 'topk-rkl[plot]'
"""

from topk_rkl.plot.page import save_html
from topk_rkl.plot.picture import save_png
from topk_rkl.plot.report import TokenReport, token_report

__all__ = ["TokenReport", "save_html", "save_png", "token_report"]
