// sum_of_products of a few rows, bound by reading b: it is gone through once, as it lies in memory.
// Included by kernel files only.
#pragma once

#include "sum_of_products.hpp"

namespace fastlora::FASTLORA_ISA {

// Whether the rows are so few that this is the faster way.
bool has_few_rows(const SumOfProducts& call);

// The same to the bit for every number of threads.
void sum_of_few_rows(const SumOfProducts& call, int threads);

}  // namespace fastlora::FASTLORA_ISA
