-- Reads what the entry of a task in a line will have.
--
-- KEYS    1 line
-- ARGV    1 task id; 2 epoch
-- result  schema version, epoch and entry JSON; false if the line has no such task
for _, element in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  local version, epoch, id, entry_json = string.match(element, '^(%d+) (%d+) %x+ (%x+)\n[^\n]*\n(.*)$')
  if id == ARGV[1] and epoch == ARGV[2] then return {version, epoch, entry_json} end
end
return false
