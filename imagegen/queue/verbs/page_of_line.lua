-- Reads which tasks wait in a part of a line. It is read from its end, where no task leaves it.
--
-- KEYS    1 line
-- ARGV    1 number of elements behind the part; 2 bytes after which no more is read
-- result  number of commands; 1 if there are elements before the part, else 0; then epoch and id of each element
local passed, bytes, results, PAGE = tonumber(ARGV[1]), tonumber(ARGV[2]), {1, 1}, 16
repeat
  local elements = run_on('LRANGE', KEYS[1], -passed - PAGE, -passed - 1)
  for _, element in ipairs(elements) do
    bytes = bytes - #element
    local epoch, id = string.match(element, '^%d+ (%d+) %x+ (%x+)\n')
    results[#results + 1] = epoch and epoch .. ' ' .. id or ''
  end
  passed, results[1] = passed + #elements, results[1] + 1
  if #elements < PAGE then results[2] = 0 end
until bytes <= 0 or results[2] == 0
return results
