"""Measure training steps of several systems, each in its own process, on the same work.

``job`` says what is measured, ``worker`` measures it in a fresh process, ``driver`` starts the
workers, ``summary`` and ``table`` make medians and ratios of what they report. The demo uses
the same worker and driver.
"""
