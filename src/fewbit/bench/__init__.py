"""What a variant costs in time and memory: prefill, decode, peak memory, achieved bandwidth, operator classes; all measured, none assumed."""
