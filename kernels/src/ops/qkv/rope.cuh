// Rotation of the first `rotary` values of a head: (x[d], x[d + rotary/2]) turned by position * turns[d] full turns.
#pragma once
#include "../../cuda/ptx.cuh"

// `head(d)` gives the head's value d; returns the rotated value d. The angle is reduced in F64, so that positions of
// hundreds of thousands lose nothing.
template <class Head> DEVICE float rotated(const Head &head, int d, int rotary, int position, const double *turns) {
    const float x = head(d);
    if (d >= rotary) return x;
    const int half = rotary / 2, i = d < half ? d : d - half;
    const double turn = position * turns[i];
    float sine, cosine;
    sincospif(2.f * static_cast<float>(turn - rint(turn)), &sine, &cosine);
    return d < half ? x * cosine - head(d + half) * sine : x * cosine + head(d - half) * sine;
}
