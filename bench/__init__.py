"""Benchmarks: what is measured is in workloads.py, what was measured in RESULTS.md.

throughput latency memory_usage    the engine in this process     offline baseline report plot
end_to_end                         the server over HTTP           load load_client fake_server served
front_end overload soak            the HTTP side by itself        server_process twin
                                   clients of all four            loops http_client http_stream
host                               the engine's own work per step, without a GPU
kernels                            GPU kernels by themselves      sampling_kernels
tool_grammars prefix_affinity      grammars of tool calls, routing by prefixes

The clocks and pool_probe look into a running engine, through replaced.
"""
