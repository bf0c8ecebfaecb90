"""m3check: does an optimized MiniMax-M3 sparse-attention kernel compute what the mathematics says?"""
