-- Reads what the entry of a task in a line will have, if the task is in a page of the line.
--
-- KEYS    1 line
-- ARGV    1 task id; 2 epoch; 3 number of elements behind the page; 4 length of the page
-- result  schema version, epoch and entry JSON; else 1 if there are elements before the page, 0 if not
local last, length = -1 - tonumber(ARGV[3]), tonumber(ARGV[4])
local elements = redis.call('LRANGE', KEYS[1], last - length + 1, last)
for _, element in ipairs(elements) do
  local epoch, id = string.match(element, '^%d+ (%d+) %x+ (%x+)\n')
  if id == ARGV[1] and epoch == ARGV[2] then
    return {string.match(element, '^(%d+) (%d+) %x+ %x+\n[^\n]*\n(.*)$')}
  end
end
return #elements == length and 1 or 0
