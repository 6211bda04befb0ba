"""What a variant costs in time and memory: prefill, decode, peak memory, achieved bandwidth, operator classes; measured, not assumed."""
