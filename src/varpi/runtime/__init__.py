"""What everything else stands on: files, the Hub, processes, timings, random streams."""
