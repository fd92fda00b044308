-- Reads what the entry of a task in a line will have, if the task is in a part of the line.
--
-- KEYS    1 line
-- ARGV    1 task id; 2 epoch; 3 number of elements behind the part; 4 bytes after which no more is read
-- result  number of commands; number of elements before which the next part ends, -1 if there is none; then schema
--         version, epoch and entry JSON if the task was found
local passed, bytes, commands, PAGE, elements = tonumber(ARGV[3]), tonumber(ARGV[4]), 1, 16, nil
repeat
  elements = redis.call('LRANGE', KEYS[1], -passed - PAGE, -passed - 1)
  commands, passed = commands + 1, passed + #elements
  for _, element in ipairs(elements) do
    bytes = bytes - #element
    local epoch, id = string.match(element, '^%d+ (%d+) %x+ (%x+)\n')
    if id == ARGV[1] and epoch == ARGV[2] then
      return {commands, -1, string.match(element, '^(%d+) (%d+) %x+ %x+\n[^\n]*\n(.*)$')}
    end
  end
until bytes <= 0 or #elements < PAGE
return {commands, #elements == PAGE and passed or -1}
