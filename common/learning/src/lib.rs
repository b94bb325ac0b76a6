//! Model specs, data, training and evaluation on candle.
