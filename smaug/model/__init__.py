"""The networks. Every one of them runs on packed tokens; none knows what padding is."""
