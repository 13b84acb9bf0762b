//! Graph to Graph: gradient, optimizer, fold, fuse.
