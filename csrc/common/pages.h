// How the system backs memory that others allocated.
#pragma once

#include <cstddef>

namespace interfuse {

// Asks for huge pages in memory that is about to be written for the first time, where it is so large that malloc maps it
// anew each time: a fault for each 4 KiB takes several times as long as writing them. Elsewhere, nothing happens.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace interfuse
