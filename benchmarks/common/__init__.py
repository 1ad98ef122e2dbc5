"""What every benchmark uses: clocks, machines, models, the results' shape."""
